// Results become part of a tree.

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "require.hpp"
#include "tercet/forest.hpp"

namespace tercet {

Forest::Finding Forest::finding_of(const Pending& pending) const {
  Finding finding{.value = pending.value, .handles = pending.handles};
  if (const Details* details = pending.details.get()) {
    finding.priors = details->priors;
    finding.terminal = details->terminal;
    finding.channels = details->channels;
    finding.outcome = details->outcome;
    finding.cost = details->cost;
    if (details->start_verdict) finding.verdict = static_cast<float>(*details->start_verdict);
  }
  return finding;
}

void Forest::take_in(Tree& tree, std::span<const NodeIndex> path, double value,
                     std::span<const double> channels) {
  if (plain_mean_) {
    for (const NodeIndex node : path) nodes_.hot(node).arrive(value);
  } else {
    back_up(nodes_, path, value, channels, config_.backup,
            config_.select.min_max == MinMax::kTree ? &tree.bounds : nullptr);
  }
}

// As if the oldest of a queue had not been issued.
void Forest::withdraw(Tree& tree, Queue& queue) {
  const Pending& oldest = queue[0];
  for (const NodeIndex node : oldest.path) nodes_.hot(node).turn_back();
  const bool simulates = &queue == &tree.pending;
  if (simulates) tree.begun -= 1;
  if (!simulates || config_.tickets == TicketMode::kTogether) {
    nodes_.hot(oldest.path.back()).set_asked(false);
  }
  if (oldest.details) account(tree, {.cost = oldest.details->cost});
  queue.drop_oldest();
  tree.blocked = false;
}

void Forest::commit_simulation(TreeId id, const Finding& finding) {
  Tree& tree = trees_[id];
  const std::vector<NodeIndex>& path = tree.pending[0].path;
  const NodeIndex index = path.back();
  HotNode& leaf = nodes_.hot(index);
  if (nodes_.layout().cold) {
    Cold& cold = nodes_.cold(index);
    cold.own = finding.value;
    cold.verdict = finding.verdict;
  }
  if (config_.tickets == TicketMode::kTogether) leaf.set_asked(false);
  if (leaf.is_terminal()) {
    End& end = tree.ends[leaf.end()];
    end.value = finding.value;
    end.channels.assign(finding.channels.begin(), finding.channels.end());
  } else if (config_.tickets == TicketMode::kTogether) {
    if (finding.handles.empty()) {
      add_end(tree, index, finding.value, finding.channels);
    } else {
      grow(tree, index, finding);
    }
  }
  take_in(tree, path, finding.value, finding.channels);
  tree.pending.drop_oldest();
  tree.blocked = false;
  tree.committed += 1;
  counters_.simulations += 1;
  counters_.evaluations += 1;
  tree.evaluations += 1;
  account(tree, finding);
  if (config_.solver) close(tree, index);
}

void Forest::commit_expansion(TreeId id, const Finding& finding) {
  Tree& tree = trees_[id];
  const std::vector<NodeIndex>& path = tree.expanding[0].path;
  const NodeIndex index = path.back();
  HotNode& node = nodes_.hot(index);
  for (const NodeIndex above : path) nodes_.hot(above).turn_back();
  node.set_asked(false);
  if (node.has_children()) {
    widen(tree, index, finding);
  } else if (!finding.handles.empty()) {
    grow(tree, index, finding);
  } else {
    const bool unseen = config_.tickets == TicketMode::kLazy && index == tree.root;
    const double own = unseen ? config_.failed_value : nodes_.cold(index).own;
    std::span<const double> channels = unseen ? failed_channels_ : nodes_.channels(index);
    if (std::isnan(own)) channels = {};
    add_end(tree, index, own, channels);
  }
  tree.expanding.drop_oldest();
  tree.blocked = false;
  counters_.expansions += 1;
  account(tree, finding);
  if (config_.solver) close(tree, index);
}

void Forest::add_end(Tree& tree, NodeIndex node, double value, std::span<const double> channels) {
  nodes_.hot(node).set_end(static_cast<std::uint32_t>(tree.ends.size()));
  tree.ends.push_back({value, {channels.begin(), channels.end()}});
}

// The children of a telling that are new, those merged into `there` (of the node already) counted.
// Priors of merged ones go to the child that is there.
Forest::Fresh Forest::merged(const Finding& finding, NodeIndex first, std::uint32_t there) {
  Fresh fresh;
  for (std::size_t i = 0; i < finding.handles.size(); ++i) {
    const std::int64_t handle = finding.handles[i];
    const float prior = finding.priors.empty() ? 0.0f : finding.priors[i];
    std::uint32_t old = 0;
    while (old < there && nodes_.handle(first + old) != handle) ++old;
    const auto same = std::ranges::find(fresh.handles, handle);
    if (old == there && same == fresh.handles.end()) {
      fresh.handles.push_back(handle);
      if (!finding.priors.empty()) fresh.priors.push_back(prior);
      if (!finding.terminal.empty()) fresh.terminal.push_back(finding.terminal[i]);
      continue;
    }
    counters_.merged += 1;
    if (finding.priors.empty()) continue;
    if (old < there) {
      nodes_.priors(first)[old] += prior;
    } else {
      fresh.priors[static_cast<std::size_t>(same - fresh.handles.begin())] += prior;
    }
  }
  return fresh;
}

// Priors and ends of `n` children from `first` on, of `all` that the node has now.
void Forest::furnish(Tree& tree, NodeIndex first, std::size_t n, std::uint32_t all,
                     const Finding& finding) {
  if (nodes_.layout().priors) {
    float* priors = nodes_.priors(first);
    if (finding.priors.empty()) {
      std::fill_n(priors, n, static_cast<float>(1.0 / all));
    } else {
      std::ranges::copy(finding.priors, priors);
    }
  }
  for (std::size_t i = 0; i < finding.terminal.size(); ++i) {
    if (finding.terminal[i] == 0) continue;
    add_end(tree, first + static_cast<NodeIndex>(i), kNaN, {});
    knows_terminal_ = true;
  }
  counters_.nodes += n;
  tree.nodes += static_cast<std::uint32_t>(n);
}

// A leaf gets its first children.
void Forest::grow(Tree& tree, NodeIndex leaf, const Finding& finding) {
  if (!config_.merge_duplicates) {
    const auto n = static_cast<std::uint32_t>(finding.handles.size());
    furnish(tree, nodes_.add_children(tree.slabs, leaf, finding.handles), n, n, finding);
  } else {
    const Fresh fresh = merged(finding, 0, 0);
    const auto n = static_cast<std::uint32_t>(fresh.handles.size());
    furnish(tree, nodes_.add_children(tree.slabs, leaf, fresh.handles), n, n,
            {.priors = fresh.priors, .terminal = fresh.terminal});
  }
  if (leaf == tree.root) start_root(tree, true);
}

// A node with children gets more.
void Forest::widen(Tree& tree, NodeIndex node, const Finding& finding) {
  const NodeIndex first = nodes_.hot(node).first_child();
  const std::uint32_t there = nodes_.num_children(node);
  Finding more = finding;
  Fresh fresh;
  if (config_.merge_duplicates) {
    fresh = merged(finding, first, there);
    more = {.handles = fresh.handles, .priors = fresh.priors, .terminal = fresh.terminal};
  }
  Cold& cold = nodes_.cold(node);
  if (more.handles.empty()) {  // children that are there already may be proposed again by chance
    cold.misses += 1;
    const std::uint32_t most = std::min(config_.max_attempts, 255u);
    cold.is_full = finding.handles.empty() || cold.misses >= most;
    return;
  }
  cold.misses = 0;
  const auto n = static_cast<std::uint32_t>(more.handles.size());
  nodes_.append_children(node, more.handles);
  furnish(tree, first + there, n, there + n, more);
  if (node == tree.root) start_root(tree, false);
}

// Random numbers of a root, once it has children; noise in their priors where these are new.
void Forest::start_root(Tree& tree, bool mixes_noise) {
  if (!nodes_.hot(tree.root).has_children()) return;
  const SelectConfig& select = config_.select;
  const std::uint32_t n = nodes_.num_children(tree.root);
  const Random random(tree.seed, nodes_.handle(tree.root));
  if (select.rule == Rule::kGumbel) {
    tree.noise.resize(n);
    for (std::uint32_t i = 0; i < n; ++i) tree.noise[i] = random.gumbel(i);
    tree.schedule =
        halving_schedule(std::min(select.gumbel_considered, n), std::max(tree.simulations, 2u) - 1);
  }
  if (!mixes_noise || select.dirichlet_alpha == 0.0 || !nodes_.layout().priors) return;
  std::array<double, kMaxChildren> noise;
  random.dirichlet(select.dirichlet_alpha, std::span(noise).first(n));
  float* priors = nodes_.priors(nodes_.hot(tree.root).first_child());
  for (std::uint32_t i = 0; i < n; ++i) {
    priors[i] = static_cast<float>((1.0 - select.dirichlet_fraction) * priors[i] +
                                   select.dirichlet_fraction * noise[i]);
  }
}

void Forest::account(Tree& tree, const Finding& finding) {
  if (finding.cost.is_some()) {
    tree.spent += finding.cost;
    counters_.spent += finding.cost;
  }
  if (finding.outcome > 0.0) {
    tree.positives += 1;
    counters_.positives += 1;
  } else if (finding.outcome < 0.0) {
    tree.negatives += 1;
    counters_.negatives += 1;
  }
  apply_stop_rules(tree);
}

void Forest::apply_stop_rules(Tree& tree) {
  if ((!stops_ && !tree.has_budget) || tree.stopped != StopReason::kRunning) return;
  const StopRules& stop = config_.stop;
  if (stop.correct && tree.positives > 0) {
    tree.stopped = StopReason::kCorrect;
  } else if ((stop.positives > 0 || stop.negatives > 0) && tree.positives >= stop.positives &&
             tree.negatives >= stop.negatives) {
    tree.stopped = StopReason::kSamples;
  } else if (tree.budget.is_reached(tree.evaluations, tree.nodes, tree.spent)) {
    tree.stopped = StopReason::kBudget;
  } else if (stop.converged && is_converged(tree)) {
    tree.stopped = StopReason::kConverged;
  }
}

// Whether the second child of the root cannot overtake the first.
bool Forest::is_converged(const Tree& tree) const {
  const HotNode& root = nodes_.hot(tree.root);
  if (!root.has_children()) return false;
  std::uint32_t first = 0, second = 0, n = 1;
  for (const HotNode* child = &nodes_.hot(root.first_child());; ++child, ++n) {
    second = std::max(second, std::min(first, child->visits()));
    first = std::max(first, child->visits());
    if (child->is_last()) break;
  }
  return n >= 2 && first - second > tree.simulations - tree.committed;
}

// Whether nothing below is left to find out.
bool Forest::is_known(const Tree& tree, NodeIndex index) const {
  const HotNode& node = nodes_.hot(index);
  if (node.is_terminal()) return !std::isnan(tree.ends[node.end()].value);
  if (!node.has_children()) return false;
  if (may_grow(index)) return false;
  for (const HotNode* child = &nodes_.hot(node.first_child());; ++child) {
    if (!child->is_closed()) return false;
    if (child->is_last()) return true;
  }
}

void Forest::close(Tree& tree, NodeIndex node) {
  while (is_known(tree, node)) {
    nodes_.hot(node).set_closed();
    if (node == tree.root) {
      if (tree.stopped == StopReason::kRunning) tree.stopped = StopReason::kClosed;
      return;
    }
    node = nodes_.parent(node);
  }
}

// Counts a tree that has come to its end, or goes on after one.
void Forest::settle(Tree& tree) {
  const bool finished = (tree.stopped != StopReason::kRunning || tree.begun == tree.simulations) &&
                        tree.pending.empty() && tree.expanding.empty();
  if (finished == tree.finished) return;
  tree.finished = finished;
  finished ? ++counters_.finished : --counters_.finished;
}

void Forest::advance(TreeId id) {
  Tree& tree = trees_[id];
  while (!may_go_down(tree)) {
    Queue& queue = tree.expanding.empty() ? tree.pending : tree.expanding;
    if (queue.empty()) break;
    const Pending& oldest = queue[0];
    if (oldest.state == State::kCancelled) {
      withdraw(tree, queue);
    } else if (oldest.state != State::kTold) {
      break;
    } else {
      forget_waiting(oldest);
      const Finding finding = finding_of(oldest);
      &queue == &tree.expanding ? commit_expansion(id, finding) : commit_simulation(id, finding);
    }
  }
  settle(tree);
  if (!tree.queued && may_go_down(tree)) {
    tree.queued = true;
    ready_.push_back(id);
  }
}

}  // namespace tercet
