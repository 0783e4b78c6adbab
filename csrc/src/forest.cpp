#include "tercet/forest.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace tercet {

namespace {

constexpr std::size_t kAhead = 4;   // results whose memory is asked for before their turn
constexpr std::size_t kLanes = 16;  // descents at a time: one's memory comes while others work

std::string told(TicketFault fault) {
  switch (fault) {
    case TicketFault::kUnknown:
      return "was never issued";
    case TicketFault::kRepeated:
      return "has been told already";
    case TicketFault::kLate:
      return "is of a tree that was removed";
  }
  return "";
}

// NaN is not.
bool is_value(double value) { return std::abs(value) <= kMaxValue; }

// The message is made where it is needed only.
template <typename Message>
void require(bool holds, const Message& message) {
  if (!holds) throw std::invalid_argument(message());
}

}  // namespace

BadTicket::BadTicket(TicketFault why, Ticket which)
    : std::invalid_argument("Forest: ticket " + std::to_string(ordinal_of(which)) + " of tree " +
                            std::to_string(tree_of(which)) + " " + told(why)),
      fault(why),
      ticket(which) {}

void check_config(const ForestConfig& c) {
  require(std::isfinite(c.c_uct) && c.c_uct >= 0.0,
          [&] { return "Forest: c_uct must be finite and >= 0, got " + std::to_string(c.c_uct); });
  require(c.max_in_flight >= 1 && c.max_in_flight <= kMaxInFlight, [&] {
    return "Forest: max_in_flight must be in [1, 255], got " + std::to_string(c.max_in_flight);
  });
  require(c.visits_per_flight >= 1,
          [&] { return std::string("Forest: visits_per_flight must be >= 1, got 0"); });
  require(c.max_attempts >= 1,
          [&] { return std::string("Forest: max_attempts must be >= 1, got 0"); });
  require(is_value(c.failed_value), [&] {
    return "Forest: failed_value must be in [-1e300, 1e300], got " + std::to_string(c.failed_value);
  });
}

void Leaves::reserve(std::size_t n) {
  ticket.reserve(n);
  tree.reserve(n);
  node.reserve(n);
  depth.reserve(n);
  handle.reserve(n);
  attempt.reserve(n);
}

Forest::Forest(const ForestConfig& config) : config_(config), nodes_(config.max_bytes) {
  check_config(config);
}

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

TreeId Forest::add_tree(std::int64_t root_handle, std::uint32_t simulations) {
  check_whole();
  require(simulations >= 1 && simulations <= kMaxVisits, [&] {
    return "Forest::add_tree: simulations must be in [1, " + std::to_string(kMaxVisits) +
           "], got " + std::to_string(simulations);
  });
  nodes_.reserve(waiting_blocks_ + 1);
  torn_ = true;
  const auto id = static_cast<TreeId>(trees_.size());
  Tree& tree = trees_.emplace_back();
  tree.root = nodes_.add_root(tree.slabs, root_handle);
  tree.simulations = simulations;
  counters_.trees += 1;
  counters_.nodes += 1;
  advance(id);
  torn_ = false;
  return id;
}

void Forest::remove_tree(TreeId id) {
  Tree& tree = checked(id);
  counters_.nodes -= nodes_.all(tree.slabs).size();  // from here on, nothing throws
  counters_.trees -= 1;
  counters_.finished -= tree.committed == tree.simulations;
  for (std::size_t i = 0; i < tree.pending.size(); ++i) {
    const Pending& pending = tree.pending[i];
    counters_.in_flight -= pending.state == State::kOut;
    if (pending.state == State::kTold) forget_waiting(pending);
  }
  std::erase_if(failed_, [id](Ticket ticket) { return tree_of(ticket) == id; });
  nodes_.release(tree.slabs);
  tree = Tree{};
  tree.alive = false;
}

bool Forest::may_issue(const Tree& tree) const {
  const std::uint32_t cap =
      std::min(config_.max_in_flight, 1 + tree.committed / config_.visits_per_flight);
  return !tree.blocked && tree.begun < tree.simulations && tree.pending.size() < cap;
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
}

void Forest::set_out(TreeId id) {
  Tree& tree = trees_[id];
  Pending& pending = tree.pending.push();
  pending.path.assign(1, tree.root);
  HotNode& root = nodes_.hot(tree.root);
  root.depart();
  lanes_.push_back({id, &pending, &root});
}

void Forest::descend() {
  for (bool moved = true; moved;) {
    moved = false;
    for (Lane& lane : lanes_) {
      if (!lane.node->has_children()) continue;
      const NodeIndex first = lane.node->first_child();
      HotNode* block = &nodes_.hot(first);
      const double log_parent = log_(lane.node->expected_visits() - 1);  // this one does not count
      const std::uint32_t best = best_child(block, log_parent, config_.c_uct);
      lane.node = block + best;
      lane.node->depart();
      lane.pending->path.push_back(first + best);
      if (lane.node->has_children()) {
        nodes_.prefetch(lane.node->first_child());
      } else {
        nodes_.prefetch_names(first + best);
      }
      moved = true;
    }
  }
}

void Forest::forget_waiting(const Pending& pending) {
  counters_.waiting -= 1;
  waiting_blocks_ -= !pending.handles.empty();
}

void Forest::hand_out(Ticket ticket, Leaves& leaves) {
  counters_.in_flight += 1;
  Pending& pending = pending_of(ticket);
  pending.state = State::kOut;
  leaves.ticket.push_back(ticket);
  leaves.tree.push_back(tree_of(ticket));
  const NodeIndex leaf = pending.path.back();
  leaves.node.push_back(nodes_.local(leaf));
  leaves.depth.push_back(static_cast<std::uint32_t>(pending.path.size()) - 1);
  leaves.handle.push_back(nodes_.handle(leaf));
  leaves.attempt.push_back(pending.attempts);
}

void Forest::land(const Lane& lane, Leaves& leaves) {
  Tree& tree = trees_[lane.tree];
  Pending& pending = *lane.pending;
  if (lane.node->is_asked()) {
    for (const NodeIndex node : pending.path) nodes_.hot(node).turn_back();
    tree.pending.drop_newest();
    tree.blocked = true;
  } else if (lane.node->is_terminal()) {
    const double value = tree.ends[lane.node->end()];
    for (const NodeIndex node : pending.path) nodes_.hot(node).arrive(value);
    tree.pending.drop_newest();
    tree.begun += 1;
    count_simulation(tree);
  } else {
    lane.node->set_asked(true);
    pending.attempts = 1;
    tree.begun += 1;
    const auto newest = static_cast<std::uint32_t>(tree.pending.size() - 1);
    hand_out(ticket_of(lane.tree, tree.oldest + newest), leaves);
  }
  advance(lane.tree);
}

void Forest::count_simulation(Tree& tree) {
  tree.committed += 1;
  counters_.simulations += 1;
  counters_.finished += tree.committed == tree.simulations;
}

void Forest::commit(Tree& tree, double value, std::span<const std::int64_t> handles) {
  const std::vector<NodeIndex>& path = tree.pending[0].path;
  HotNode& leaf = nodes_.hot(path.back());
  leaf.set_asked(false);
  if (handles.empty()) {
    leaf.set_end(static_cast<std::uint32_t>(tree.ends.size()));
    tree.ends.push_back(value);
  } else {
    nodes_.add_children(tree.slabs, path.back(), handles);
    counters_.nodes += handles.size();
  }
  for (const NodeIndex node : path) nodes_.hot(node).arrive(value);
  tree.pending.drop_oldest();
  tree.oldest += 1;
  tree.blocked = false;
  counters_.evaluations += 1;
  count_simulation(tree);
}

void Forest::advance(TreeId id) {
  Tree& tree = trees_[id];
  while (!may_issue(tree) && tree.pending.size() > 0 && tree.pending[0].state == State::kTold) {
    const Pending& oldest = tree.pending[0];
    forget_waiting(oldest);
    commit(tree, oldest.value, oldest.handles);
  }
  if (!tree.queued && may_issue(tree)) {
    tree.queued = true;
    ready_.push_back(id);
  }
}

void Forest::hand_out_failed(std::size_t max_leaves, Leaves& leaves) {
  while (!failed_.empty() && leaves.size() < max_leaves) {
    hand_out(failed_.front(), leaves);
    failed_.pop_front();
  }
}

Leaves Forest::ask(std::size_t max_leaves) {
  check_whole();
  Leaves leaves;
  leaves.reserve(std::min(max_leaves, failed_.size() + ready_.size()));  // of some trees: more
  torn_ = true;
  hand_out_failed(max_leaves, leaves);
  while (leaves.size() < max_leaves && !ready_.empty()) {
    const std::size_t most = std::min(kLanes, max_leaves - leaves.size());
    lanes_.clear();
    while (lanes_.size() < most && !ready_.empty()) {
      const TreeId id = ready_.front();
      ready_.pop_front();
      Tree& tree = trees_[id];
      tree.queued = false;
      if (tree.alive) set_out(id);
    }
    descend();
    for (const Lane& lane : lanes_) land(lane, leaves);
  }
  torn_ = false;
  return leaves;
}

Forest::Pending& Forest::pending_of(Ticket ticket) {
  Tree& tree = trees_[tree_of(ticket)];
  return tree.pending[ordinal_of(ticket) - tree.oldest];
}

Forest::Pending& Forest::find(Ticket ticket) {
  const TreeId id = tree_of(ticket);
  if (id >= trees_.size()) throw BadTicket(TicketFault::kUnknown, ticket);
  Tree& tree = trees_[id];
  if (!tree.alive) throw BadTicket(TicketFault::kLate, ticket);
  const std::uint32_t ordinal = ordinal_of(ticket);
  if (ordinal < tree.oldest) throw BadTicket(TicketFault::kRepeated, ticket);
  if (ordinal - tree.oldest >= tree.pending.size()) {
    throw BadTicket(TicketFault::kUnknown, ticket);
  }
  Pending& pending = pending_of(ticket);
  if (pending.state != State::kOut) throw BadTicket(TicketFault::kRepeated, ticket);
  return pending;
}

// All of them or, where one is bad, none.
void Forest::claim(std::span<const Ticket> tickets) {
  std::size_t claimed = 0;
  try {
    for (; claimed < tickets.size(); ++claimed) find(tickets[claimed]).state = State::kClaimed;
  } catch (...) {
    while (claimed > 0) pending_of(tickets[--claimed]).state = State::kOut;
    throw;
  }
}

void Forest::check(const Results& results) {
  const std::size_t n = results.tickets.size();
  require(results.values.size() == n && results.num_children.size() == n, [&] {
    return "Forest::tell: tickets, values and num_children must be of one length, got " +
           std::to_string(n) + ", " + std::to_string(results.values.size()) + " and " +
           std::to_string(results.num_children.size());
  });
  std::size_t children = 0;
  std::size_t blocks = 0;
  for (std::size_t i = 0; i < n; ++i) {
    require(is_value(results.values[i]), [&] {
      return "Forest::tell: values must be in [-1e300, 1e300], got " +
             std::to_string(results.values[i]) + " at " + std::to_string(i);
    });
    require(results.num_children[i] <= kMaxChildren, [&] {
      return "Forest::tell: num_children must be <= " + std::to_string(kMaxChildren) + ", got " +
             std::to_string(results.num_children[i]) + " at " + std::to_string(i);
    });
    children += results.num_children[i];
    blocks += results.num_children[i] > 0;
  }
  require(results.handles.size() == children, [&] {
    return "Forest::tell: handles must be as many as all num_children together, " +
           std::to_string(children) + ", got " + std::to_string(results.handles.size());
  });
  nodes_.reserve(waiting_blocks_ + blocks);
}

void Forest::prefetch(Ticket ticket) {
  for (const NodeIndex node : pending_of(ticket).path) nodes_.prefetch(node);
  nodes_.prefetch_next(trees_[tree_of(ticket)].slabs);
}

void Forest::tell(const Results& results) {
  check_whole();
  check(results);
  claim(results.tickets);
  torn_ = true;
  counters_.in_flight -= results.tickets.size();
  std::size_t next = 0;
  for (std::size_t i = 0; i < results.tickets.size(); ++i) {
    if (i + kAhead < results.tickets.size()) prefetch(results.tickets[i + kAhead]);
    const auto handles = results.handles.subspan(next, results.num_children[i]);
    next += handles.size();
    const Ticket ticket = results.tickets[i];
    Tree& tree = trees_[tree_of(ticket)];
    if (ordinal_of(ticket) == tree.oldest && !may_issue(tree)) {
      commit(tree, results.values[i], handles);
    } else {
      Pending& pending = pending_of(ticket);
      pending.state = State::kTold;
      pending.value = results.values[i];
      pending.handles.assign(handles.begin(), handles.end());
      counters_.waiting += 1;
      waiting_blocks_ += !handles.empty();
    }
    advance(tree_of(ticket));
  }
  torn_ = false;
}

void Forest::queue_again(Ticket ticket) {
  pending_of(ticket).state = State::kFailed;
  failed_.push_back(ticket);
}

std::size_t Forest::recall() {
  check_whole();
  torn_ = true;
  std::size_t recalled = 0;
  for (TreeId id = 0; id < trees_.size(); ++id) {
    const Tree& tree = trees_[id];
    for (std::uint32_t i = 0; i < tree.pending.size(); ++i) {
      if (tree.pending[i].state != State::kOut) continue;
      queue_again(ticket_of(id, tree.oldest + i));
      recalled += 1;
    }
  }
  counters_.in_flight -= recalled;
  torn_ = false;
  return recalled;
}

void Forest::fail(std::span<const Ticket> tickets) {
  check_whole();
  claim(tickets);
  torn_ = true;
  counters_.in_flight -= tickets.size();
  for (const Ticket ticket : tickets) {
    Pending& pending = pending_of(ticket);
    counters_.failures += 1;
    if (pending.attempts < config_.max_attempts) {
      pending.attempts += 1;
      queue_again(ticket);
      continue;
    }
    counters_.given_up += 1;
    pending.value = config_.failed_value;
    pending.handles.clear();
    pending.state = State::kTold;
    counters_.waiting += 1;
    advance(tree_of(ticket));
  }
  torn_ = false;
}

bool Forest::is_finished(TreeId id) const {
  const Tree& tree = checked(id);
  return tree.committed == tree.simulations;
}

Counters Forest::counters() const {
  check_whole();
  Counters now = counters_;
  now.bytes = nodes_.bytes();
  return now;
}

TreeColumns Forest::columns(TreeId id) const {
  const Tree& tree = checked(id);
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
    found.handle.push_back(nodes_.handle(node));
    found.terminal.push_back(hot.is_terminal());
  }
  return found;
}

}  // namespace tercet
