#include "tercet/forest.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "require.hpp"

namespace tercet {

namespace {

constexpr double kMaxWeight = 1e299;  // with a verdict or two, a reward stays below kMaxValue

bool multiplies(const BackupConfig& backup) {
  return backup.how == Backup::kProduct ||
         std::ranges::any_of(backup.channels, [](const ChannelConfig& c) {
           return c.channel.how == Aggregation::kProduct;
         });
}

constexpr std::size_t kLanes = 16;  // descents at a time: one's memory comes while others work

bool keeps_cold(const ForestConfig& c) {
  return c.tickets != TicketMode::kTogether || c.select.rule == Rule::kGumbel || c.widening > 0.0;
}

Layout layout_of(const ForestConfig& c) {
  return {.priors = reads_priors(c.select),
          .cold = keeps_cold(c),
          .channels = static_cast<std::uint32_t>(c.backup.channels.size()),
          .room = c.widening > 0.0 ? c.max_children : 1};
}

bool is_plain(const ForestConfig& c) {
  return c.select.rule == Rule::kUct && c.select.unfinished == Unfinished::kUnobserved &&
         c.select.min_max == MinMax::kNone && c.backup.how == Backup::kMean && !c.solver &&
         !c.dual_target && c.widening == 0.0;
}

bool adds_only(const ForestConfig& c) {
  return (c.backup.how == Backup::kMean || c.backup.how == Backup::kSum) && c.backup.gamma == 1.0 &&
         c.backup.channels.empty() && c.select.min_max != MinMax::kTree;
}

}  // namespace

void check_config(const ForestConfig& c) {
  check_config(c.select);
  check_config(c.backup);
  check_config(c.reward);
  check_budget(c.budget);
  require(std::isfinite(c.widening) && c.widening >= 0.0,
          [&] { return "Forest: widening must be >= 0, got " + std::to_string(c.widening); });
  require(c.widening_alpha >= 0.0 && c.widening_alpha <= 1.0, [&] {
    return "Forest: widening_alpha must be in [0, 1], got " + std::to_string(c.widening_alpha);
  });
  require_range(c.max_children, 1, kMaxChildren, "max_children");
  require_range(c.max_in_flight, 1, kMaxInFlight, "max_in_flight");
  require_range(c.max_unverified, 1, kMaxInFlight, "max_unverified");
  require(c.tickets == TicketMode::kTogether || c.max_in_flight + c.max_unverified <= kMaxInFlight,
          [&] {
            return "Forest: max_in_flight and max_unverified must be at most 255 together, got " +
                   std::to_string(c.max_in_flight) + " and " + std::to_string(c.max_unverified);
          });
  const bool has_two_queues = c.tickets == TicketMode::kTogether && c.widening > 0.0;
  require(!has_two_queues || c.max_in_flight <= kMaxInFlight / 2, [&] {
    return "Forest: max_in_flight must be at most 127 with widening, got " +
           std::to_string(c.max_in_flight);
  });
  require(c.select.unfinished != Unfinished::kVirtualLoss || c.backup.how == Backup::kMean, [] {
    return std::string("Forest: backup must be \"mean\" where unfinished is \"virtual_loss\"");
  });
  require(c.select.dirichlet_alpha == 0.0 || reads_priors(c.select), [] {
    return std::string(
        "Forest: dirichlet_alpha is noise on priors, which these settings do not read");
  });
  require(c.visits_per_flight >= 1,
          [&] { return std::string("Forest: visits_per_flight must be >= 1, got 0"); });
  require(c.max_attempts >= 1,
          [&] { return std::string("Forest: max_attempts must be >= 1, got 0"); });
  const double most = multiplies(c.backup) ? 1.0 : kMaxValue;
  require(std::abs(c.failed_value) <= most, [&] {
    return std::string("Forest: failed_value must be in ") +
           (most == 1.0 ? "[-1, 1] where values are multiplied" : "[-1e300, 1e300]") + ", got " +
           std::to_string(c.failed_value);
  });
  require(c.reward.outcome_weight <= kMaxWeight, [&] {
    return "Forest: outcome_weight of the reward must be <= 1e299, got " +
           std::to_string(c.reward.outcome_weight);
  });
}

void Leaves::reserve(std::size_t n) {
  ticket.reserve(n);
  tree.reserve(n);
  node.reserve(n);
  kind.reserve(n);
  depth.reserve(n);
  handle.reserve(n);
  attempt.reserve(n);
}

Forest::Details& Forest::Pending::detailed() {
  if (!details) details = std::make_unique<Details>();
  return *details;
}

Forest::Pending& Forest::Queue::push() {
  if (size_ == slots_.size()) {
    std::rotate(slots_.begin(), slots_.begin() + static_cast<std::ptrdiff_t>(head_), slots_.end());
    head_ = 0;
    slots_.emplace_back();
  }
  return (*this)[size_++];
}

void Forest::Queue::drop_oldest() {
  head_ = (head_ + 1) % slots_.size();
  size_ -= 1;
  oldest += 1;
}

// Trees.

Forest::Forest(const ForestConfig& config)
    : config_((check_config(config), config)),
      plain_(is_plain(config)),
      plain_mean_(adds_only(config)),
      stops_(config.stop.positives > 0 || config.stop.negatives > 0 || config.stop.correct ||
             config.stop.converged),
      failed_channels_(config.backup.channels.size(), config.failed_value),
      nodes_(config.max_bytes, layout_of(config)) {}

void Forest::check_whole() const {
  if (torn_) {
    throw std::runtime_error(
        "Forest: memory ran out in the middle of an earlier call; load a snapshot");
  }
}

const Forest::Tree& Forest::checked(TreeId tree) const {
  check_whole();
  if (tree >= trees_.size() || !trees_[tree].alive) {
    throw std::out_of_range("Forest: tree " + std::to_string(tree) +
                            (tree < trees_.size() ? " was removed" : " does not exist"));
  }
  return trees_[tree];
}

Forest::Tree& Forest::checked(TreeId tree) {
  return const_cast<Tree&>(std::as_const(*this).checked(tree));
}

TreeId Forest::add_tree(std::int64_t root_handle, std::uint32_t simulations, std::uint64_t seed,
                        const Budget& budget) {
  check_whole();
  require(simulations >= 1 && simulations <= kMaxVisits, [&] {
    return "Forest::add_tree: simulations must be in [1, " + std::to_string(kMaxVisits) +
           "], got " + std::to_string(simulations);
  });
  check_budget(budget);
  nodes_.reserve(waiting_blocks_ + 1);
  torn_ = true;
  const auto id = static_cast<TreeId>(trees_.size());
  Tree& tree = trees_.emplace_back();
  tree.root = nodes_.add_root(tree.slabs, root_handle);
  tree.simulations = simulations;
  tree.seed = seed;
  tree.budget = budget;
  tree.has_budget = !budget.is_none();
  counters_.trees += 1;
  counters_.nodes += 1;
  advance(id);
  torn_ = false;
  return id;
}

TreeId Forest::add_tree_along(std::int64_t root_handle, std::uint32_t simulations,
                              std::span<const std::uint32_t> landings, std::uint64_t seed) {
  require(!landings.empty(), [] {
    return std::string(
        "Forest::add_tree_along: landings must not be empty; did the settings of the "
        "tree that they are from say record?");
  });
  const TreeId id = add_tree(root_handle, simulations, seed);
  torn_ = true;
  trees_[id].script.assign(landings.begin(), landings.end());
  torn_ = false;
  return id;
}

void Forest::remove_tree(TreeId id) {
  Tree& tree = checked(id);
  counters_.nodes -= tree.nodes;  // from here on, nothing throws
  counters_.trees -= 1;
  counters_.finished -= tree.finished;
  for (Queue* queue : {&tree.pending, &tree.expanding}) {
    for (std::size_t i = 0; i < queue->size(); ++i) {
      const Pending& pending = (*queue)[i];
      counters_.in_flight -= pending.state == State::kOut;
      if (pending.state == State::kTold) forget_waiting(pending);
    }
  }
  std::erase_if(again_, [id](Ticket ticket) { return tree_of(ticket) == id; });
  nodes_.release(tree.slabs);
  tree = Tree{};
  tree.alive = false;
}

void Forest::extend(TreeId id, std::uint32_t simulations) {
  Tree& tree = checked(id);
  require(simulations >= 1 && simulations <= kMaxVisits - tree.simulations, [&] {
    return "Forest::extend: simulations must be in [1, " +
           std::to_string(kMaxVisits - tree.simulations) + "], got " + std::to_string(simulations);
  });
  torn_ = true;
  tree.simulations += simulations;
  start_root(tree, false);
  advance(id);
  torn_ = false;
}

std::uint64_t Forest::reallocate() {
  check_whole();
  std::uint64_t unused = 0;
  std::vector<TreeId> hard;
  for (TreeId id = 0; id < trees_.size(); ++id) {
    const Tree& tree = trees_[id];
    if (!tree.alive) continue;
    if (!tree.finished) {
      throw std::logic_error("Forest::reallocate: tree " + std::to_string(id) +
                             " is not finished; go on with ask and tell until all are");
    }
    unused += tree.simulations - tree.committed;
    if (tree.stopped == StopReason::kRunning) hard.push_back(id);
  }
  if (unused == 0 || hard.empty()) return 0;
  std::uint64_t given = 0;
  torn_ = true;
  for (Tree& tree : trees_) tree.simulations = tree.committed;
  for (std::size_t i = 0; i < hard.size(); ++i) {
    Tree& tree = trees_[hard[i]];
    const std::uint64_t share = unused / hard.size() + (i < unused % hard.size());
    const auto more =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(share, kMaxVisits - tree.simulations));
    tree.simulations += more;
    given += more;
    start_root(tree, false);
    advance(hard[i]);
  }
  torn_ = false;
  return given;
}

void Forest::reroot(TreeId id, std::uint32_t node, std::uint32_t simulations) {
  Tree& tree = checked(id);
  if (!tree.pending.empty() || !tree.expanding.empty()) {
    throw std::logic_error("Forest::reroot: tree " + std::to_string(id) +
                           " has tickets that are not committed; tell, fail or cancel them first");
  }
  const std::optional<NodeIndex> found = nodes_.find(tree.slabs, node);
  if (!found) {
    throw std::out_of_range("Forest::reroot: tree " + std::to_string(id) + " has no node " +
                            std::to_string(node));
  }
  const bool is_new = *found != tree.root;
  const std::uint32_t visits = nodes_.hot(*found).visits();
  require(simulations >= 1 && simulations <= kMaxVisits - visits, [&] {
    return "Forest::reroot: simulations must be in [1, " + std::to_string(kMaxVisits - visits) +
           "], got " + std::to_string(simulations);
  });
  nodes_.reserve(waiting_blocks_ + tree.slabs.count + 1);
  torn_ = true;
  const Slabs old = tree.slabs;
  counters_.nodes -= tree.nodes;
  tree.slabs = {};
  tree.root = nodes_.copy(nodes_.all(old), *found, tree.slabs);
  nodes_.release(old);
  tree.nodes = static_cast<std::uint32_t>(nodes_.all(tree.slabs).size());
  counters_.nodes += tree.nodes;
  tree.begun = tree.committed = visits;
  tree.simulations = visits + simulations;
  tree.landings.clear();
  tree.script.clear();
  tree.followed = 0;
  tree.blocked = false;
  if (nodes_.hot(tree.root).is_closed()) {
    tree.stopped = StopReason::kClosed;
  } else if (tree.stopped == StopReason::kClosed || tree.stopped == StopReason::kConverged) {
    tree.stopped = StopReason::kRunning;
  }
  start_root(tree, is_new);
  advance(id);
  torn_ = false;
}

bool Forest::is_finished(TreeId id) const { return checked(id).finished; }

TreeStatus Forest::status(TreeId id) const {
  const Tree& tree = checked(id);
  const bool used_up = tree.finished && tree.stopped == StopReason::kRunning;
  return {tree.simulations,
          tree.committed,
          static_cast<std::uint32_t>(tree.pending.size() + tree.expanding.size()),
          tree.positives,
          tree.negatives,
          tree.evaluations,
          tree.nodes,
          tree.spent,
          used_up ? StopReason::kSimulations : tree.stopped};
}

Counters Forest::counters() const {
  check_whole();
  Counters now = counters_;
  now.bytes = nodes_.bytes();
  return now;
}

std::vector<std::uint32_t> Forest::landings(TreeId id) const { return checked(id).landings; }

std::optional<std::uint32_t> Forest::choice(TreeId id) const {
  const Tree& tree = checked(id);
  const HotNode& root = nodes_.hot(tree.root);
  if (!root.has_children()) return std::nullopt;
  const std::uint32_t position = choose_action(family_of(tree, tree.root, true), config_.select);
  return nodes_.local(root.first_child() + position);
}

TreeColumns Forest::columns(TreeId id) const {
  const Tree& tree = checked(id);
  const Layout& layout = nodes_.layout();
  const bool is_mean = config_.backup.how == Backup::kMean;
  TreeColumns found;
  std::vector<std::uint32_t> position(std::size_t{tree.slabs.count} * Nodes::kSlab);
  for (const NodeIndex node : nodes_.all(tree.slabs)) {
    const HotNode& hot = nodes_.hot(node);
    const bool is_root = node == tree.root;
    const std::uint32_t parent = position[nodes_.local(nodes_.parent(node))];
    position[nodes_.local(node)] = static_cast<std::uint32_t>(found.node.size());
    found.node.push_back(nodes_.local(node));
    found.parent.push_back(is_root ? -1 : std::int64_t{parent});
    found.depth.push_back(is_root ? 0 : found.depth[parent] + 1);
    found.visits.push_back(hot.visits());
    found.in_flight.push_back(hot.in_flight());
    found.total.push_back(hot.total);
    found.value.push_back(hot.visits() == 0 ? kNaN : value_of(hot, is_mean));
    found.handle.push_back(nodes_.handle(node));
    found.terminal.push_back(hot.is_terminal());
    found.closed.push_back(hot.is_closed());
    found.prior.push_back(layout.priors && !is_root ? *nodes_.priors(node)
                                                    : static_cast<float>(kNaN));
    found.verdict.push_back(layout.cold ? nodes_.cold(node).verdict : static_cast<float>(kNaN));
    const std::span<const double> channels = nodes_.channels(node);
    found.channels.insert(found.channels.end(), channels.begin(), channels.end());
  }
  return found;
}

// Going down.

void Forest::set_out(TreeId id) {
  Tree& tree = trees_[id];
  Pending& pending = tree.pending.push();
  pending.path.assign(1, tree.root);
  HotNode& root = nodes_.hot(tree.root);
  root.depart();
  if (tree.script.empty()) {
    lanes_.push_back({id, &pending, &root, false});
  } else if (!follow(id, pending)) {
    root.turn_back();
    tree.pending.drop_newest();
    advance(id);
  }
}

// Of a node with children.
bool Forest::may_grow(NodeIndex node) const {
  return config_.widening > 0.0 && !nodes_.cold(node).is_full &&
         nodes_.num_children(node) < config_.max_children;
}

bool Forest::may_ask_for_more(NodeIndex node) const {
  const HotNode& hot = nodes_.hot(node);
  return hot.has_children() && !hot.is_asked() && may_grow(node);
}

// Sets out along a script, on a path of the root alone.  Where it has come to its end, so has the
// tree; where it does not fit, the tree is stopped.
bool Forest::follow(TreeId id, Pending& pending) {
  Tree& tree = trees_[id];
  if (tree.followed == tree.script.size()) {
    if (tree.begun > 0) {
      tree.simulations = tree.begun;
    } else {
      tree.stopped = StopReason::kScript;
    }
    return false;
  }
  const std::uint32_t landing = tree.script[tree.followed++];
  const std::optional<NodeIndex> leaf = nodes_.find(tree.slabs, landing >> 1);
  const bool widens = (landing & 1) != 0;
  const bool fits =
      leaf && (widens ? may_ask_for_more(*leaf)
                      : !nodes_.hot(*leaf).has_children() || nodes_.hot(*leaf).is_asked());
  if (!fits) {
    tree.stopped = StopReason::kScript;
    return false;
  }
  pending.path.clear();
  for (NodeIndex node = *leaf; node != tree.root; node = nodes_.parent(node)) {
    pending.path.push_back(node);
    nodes_.hot(node).depart();
  }
  pending.path.push_back(tree.root);
  std::ranges::reverse(pending.path);
  lanes_.push_back({id, &pending, &nodes_.hot(*leaf), widens});
  return true;
}

bool Forest::may_widen(const HotNode& node, NodeIndex index) const {
  if (!may_ask_for_more(index)) return false;
  const double visits = node.expected_visits() - 1;  // this one does not count
  return nodes_.num_children(index) < config_.widening * std::pow(visits, config_.widening_alpha);
}

Family Forest::family_of(const Tree& tree, NodeIndex parent, bool at_root) const {
  const HotNode& node = nodes_.hot(parent);
  Family family;
  family.parent = &node;
  family.children = &nodes_.hot(node.first_child());
  if (nodes_.layout().priors) family.priors = nodes_.priors(node.first_child());
  family.tree = tree.bounds;
  const bool second_phase =
      config_.dual_target && tree.positives >= std::max(config_.stop.positives, 1u);
  family.sign = second_phase ? -1.0 : 1.0;
  if (nodes_.layout().cold) family.own = nodes_.cold(parent).own;
  family.is_mean = config_.backup.how == Backup::kMean;
  if (at_root && config_.select.rule == Rule::kGumbel) {
    family.noise = tree.noise;
    family.schedule = tree.schedule;
  }
  return family;
}

// One step of a descent; whether there was one.
template <bool plain>
bool Forest::step_down(Lane& lane) {
  if (!lane.node->has_children() || lane.widens) return false;
  const NodeIndex first = lane.node->first_child();
  HotNode* block = &nodes_.hot(first);
  std::uint32_t best = 0;
  if constexpr (plain) {
    const double log_parent = log_(lane.node->expected_visits() - 1);  // this one does not count
    best = best_child(block, log_parent, config_.select.c_uct);
  } else {
    const std::vector<NodeIndex>& path = lane.pending->path;
    lane.widens = may_widen(*lane.node, path.back());
    if (lane.widens) return false;
    best = choose_child(family_of(trees_[lane.tree], path.back(), path.size() == 1), config_.select,
                        log_);
    if (best == kNoChild) {  // all that there are are closed, but it may get others
      lane.widens = !lane.node->is_asked();
      return false;
    }
  }
  lane.node = block + best;
  lane.node->depart();
  lane.pending->path.push_back(first + best);
  if (lane.node->has_children()) {
    nodes_.prefetch(lane.node->first_child());
  } else {
    nodes_.prefetch_names(first + best);
  }
  return true;
}

void Forest::descend() {
  for (bool moved = true; moved;) {
    moved = false;
    if (plain_) {
      for (Lane& lane : lanes_) moved |= step_down<true>(lane);
    } else {
      for (Lane& lane : lanes_) moved |= step_down<false>(lane);
    }
  }
}

void Forest::hand_out(Ticket ticket, Leaves& leaves) {
  counters_.in_flight += 1;
  Pending& pending = pending_of(ticket);
  pending.state = State::kOut;
  leaves.ticket.push_back(ticket);
  leaves.tree.push_back(tree_of(ticket));
  const NodeIndex leaf = pending.path.back();
  leaves.node.push_back(nodes_.local(leaf));
  leaves.kind.push_back(static_cast<std::uint8_t>(kind_of(ticket)));
  leaves.depth.push_back(static_cast<std::uint32_t>(pending.path.size()) - 1);
  leaves.handle.push_back(nodes_.handle(leaf));
  leaves.attempt.push_back(pending.attempts);
}

// The newest of a queue becomes a ticket, handed out now or, in a full batch, with the next one.
void Forest::issue(TreeId id, Queue& queue, Leaves& leaves, std::size_t max_leaves) {
  const auto newest = static_cast<std::uint32_t>(queue.size() - 1);
  Pending& pending = queue[newest];
  pending.attempts = 1;
  if (pending.details) pending.details.reset();
  const Ticket ticket = ticket_of(id, queue.oldest + newest, &queue == &trees_[id].expanding);
  if (leaves.size() < max_leaves) {
    hand_out(ticket, leaves);
  } else {
    queue_again(ticket);
  }
}

// Undoes a descent.
void Forest::turn_back(Lane lane, bool blocks) {
  Tree& tree = trees_[lane.tree];
  for (const NodeIndex node : lane.pending->path) nodes_.hot(node).turn_back();
  tree.pending.drop_newest();
  tree.blocked = blocks;
}

void Forest::land_on_end(const Lane& lane, Leaves& leaves, std::size_t max_leaves) {
  Tree& tree = trees_[lane.tree];
  const End& end = tree.ends[lane.node->end()];
  if (!std::isnan(end.value)) {
    take_in(tree, lane.pending->path, end.value, end.channels);
    tree.pending.drop_newest();
    tree.begun += 1;
    tree.committed += 1;
    counters_.simulations += 1;
    apply_stop_rules(tree);
  } else if (lane.node->in_flight() > 1) {
    turn_back(lane, true);
  } else {
    lane.node->set_asked(config_.tickets == TicketMode::kTogether);
    tree.begun += 1;
    issue(lane.tree, tree.pending, leaves, max_leaves);
  }
}

void Forest::land(const Lane& lane, Leaves& leaves, std::size_t max_leaves) {
  Tree& tree = trees_[lane.tree];
  HotNode& leaf = *lane.node;
  const auto expand = [&] {
    leaf.set_asked(true);
    issue(lane.tree, tree.expanding, leaves, max_leaves);
  };
  const auto simulate = [&] {
    tree.begun += 1;
    issue(lane.tree, tree.pending, leaves, max_leaves);
  };
  const auto moved_to_expanding = [&] {
    tree.expanding.push().path.swap(lane.pending->path);
    tree.pending.drop_newest();
  };
  const bool seen = leaf.expected_visits() > 1;  // by others
  if (config_.record) {
    tree.landings.push_back(nodes_.local(lane.pending->path.back()) << 1 | lane.widens);
  }
  if (lane.widens) {
    moved_to_expanding();
    expand();
  } else if (leaf.is_asked()) {
    turn_back(lane, true);
  } else if (leaf.is_terminal()) {
    land_on_end(lane, leaves, max_leaves);
  } else if (config_.tickets == TicketMode::kTogether) {
    leaf.set_asked(true);
    simulate();
  } else if (config_.tickets == TicketMode::kApart && !seen) {
    tree.expanding.push().path = lane.pending->path;
    for (const NodeIndex node : lane.pending->path) nodes_.hot(node).depart();
    expand();
    simulate();
  } else if (seen || lane.pending->path.size() == 1) {
    moved_to_expanding();
    expand();
  } else {
    simulate();
  }
  advance(lane.tree);
}

void Forest::hand_out_again(std::size_t max_leaves, Leaves& leaves) {
  while (!again_.empty() && leaves.size() < max_leaves) {
    hand_out(again_.front(), leaves);
    again_.pop_front();
  }
}

std::size_t Forest::allowance() const {
  const Budget& budget = config_.budget;
  const std::uint64_t done = counters_.evaluations;
  if (budget.is_reached(done, counters_.nodes, counters_.spent)) return 0;
  const double left =
      budget.evaluations - static_cast<double>(done + counters_.in_flight + counters_.waiting);
  constexpr auto kAll = std::numeric_limits<std::size_t>::max();
  return left >= 1e18 ? kAll : static_cast<std::size_t>(std::max(left, 0.0));
}

Leaves Forest::ask(std::size_t max_leaves) {
  check_whole();
  Leaves leaves;
  if (!config_.budget.is_none()) max_leaves = std::min(max_leaves, allowance());
  leaves.reserve(std::min(max_leaves, again_.size() + ready_.size()));  // of some trees: more
  torn_ = true;
  hand_out_again(max_leaves, leaves);
  while (leaves.size() < max_leaves && !ready_.empty()) {
    const std::size_t most = std::min(kLanes, max_leaves - leaves.size());
    lanes_.clear();
    while (lanes_.size() < most && !ready_.empty()) {
      const TreeId id = ready_.front();
      ready_.pop_front();
      Tree& tree = trees_[id];
      tree.queued = false;
      if (tree.alive && may_go_down(tree)) set_out(id);
    }
    descend();
    for (const Lane& lane : lanes_) land(lane, leaves, max_leaves);
  }
  torn_ = false;
  return leaves;
}

}  // namespace tercet
