#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "tercet/forest.hpp"
#include "tercet/snapshot.hpp"

using tercet::BadTicket;
using tercet::Counters;
using tercet::Forest;
using tercet::ForestConfig;
using tercet::kMaxValue;
using tercet::kMaxVisits;
using tercet::Leaves;
using tercet::Ticket;
using tercet::TicketFault;
using tercet::TreeColumns;

namespace {

constexpr std::int64_t kUnlimited = -1;
std::int64_t allocations_left = kUnlimited;

}  // namespace

void* operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) allocations_left -= 1;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

// The n-th ticket of a tree that brings a value.
constexpr Ticket nth(std::uint32_t n, tercet::TreeId tree = 0) {
  return tercet::ticket_of(tree, n, false);
}

std::uint32_t hash(std::uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

struct Found {
  double value;
  std::vector<std::int64_t> children;
};

// A world that the handles decide: value and up to six children, none for every eighth leaf.
Found look(std::int64_t handle) {
  const std::uint32_t state = hash(static_cast<std::uint32_t>(handle));
  Found found{state / 4294967296.0 - 0.5, {}};
  const std::uint32_t count = state % 8 == 0 ? 0 : 1 + state % 6;
  for (std::uint32_t i = 0; i < count; ++i) found.children.push_back(hash(state + i));
  return found;
}

struct Told {
  void add(Ticket ticket, double value, const std::vector<std::int64_t>& children) {
    tickets.push_back(ticket);
    values.push_back(value);
    counts.push_back(static_cast<std::uint32_t>(children.size()));
    handles.insert(handles.end(), children.begin(), children.end());
  }
  [[nodiscard]] tercet::Results results() const { return {tickets, values, counts, handles}; }

  std::vector<Ticket> tickets;
  std::vector<double> values;
  std::vector<std::uint32_t> counts;
  std::vector<std::int64_t> handles;
};

using Out = std::vector<std::pair<Ticket, std::int64_t>>;

Told told(const Out& leaves) {
  Told made;
  for (const auto& [ticket, handle] : leaves) {
    const Found found = look(handle);
    made.add(ticket, found.value, found.children);
  }
  return made;
}

Out out_of(const Leaves& leaves) {
  Out out;
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    out.emplace_back(leaves.ticket[i], leaves.handle[i]);
  }
  return out;
}

void tell_one(Forest& forest, Ticket ticket, double value, std::size_t children) {
  Told one;
  one.add(ticket, value, std::vector<std::int64_t>(children, 1));
  forest.tell(one.results());
}

// The same search in plain code, one ticket after the other.
struct Plain {
  struct Node {
    std::int64_t handle;
    std::int64_t parent;
    std::vector<std::size_t> children{};
    double total{0.0};
    std::uint32_t visits{0};
    std::uint32_t in_flight{0};
    bool pending{false};
    std::optional<double> end{};
  };

  [[nodiscard]] std::size_t descend() const {
    std::size_t at = 0;
    while (!nodes[at].children.empty()) {
      const double log_parent = std::log(nodes[at].visits + nodes[at].in_flight);
      std::size_t best = nodes[at].children[0];
      double best_score = -1e300;
      for (const std::size_t child : nodes[at].children) {
        const double score = score_of(nodes[child], log_parent);
        if (score > best_score) best = child, best_score = score;
      }
      at = best;
    }
    return at;
  }

  [[nodiscard]] double score_of(const Node& node, double log_parent) const {
    const std::uint32_t expected = node.visits + node.in_flight;
    if (expected == 0) return std::numeric_limits<double>::infinity();
    const double mean = node.visits == 0 ? 0.0 : node.total / node.visits;
    return mean + config.select.c_uct * std::sqrt(log_parent / expected);
  }

  void arrive(std::size_t leaf, double value, bool departed) {
    for (auto at = static_cast<std::int64_t>(leaf); at >= 0;) {
      Node& node = nodes[static_cast<std::size_t>(at)];
      node.visits += 1;
      node.in_flight -= departed;
      node.total += value;
      at = node.parent;
    }
  }

  void commit(std::size_t leaf) {
    const Found found = look(nodes[leaf].handle);
    for (const std::int64_t handle : found.children) {
      nodes[leaf].children.push_back(nodes.size());
      nodes.push_back({handle, static_cast<std::int64_t>(leaf)});
    }
    nodes[leaf].pending = false;
    if (found.children.empty()) nodes[leaf].end = found.value;
    arrive(leaf, found.value, true);
  }

  void run(std::int64_t root, std::uint32_t simulations) {
    nodes.push_back({root, -1});
    std::vector<std::size_t> out;
    bool blocked = false;
    for (std::uint32_t begun = 0, committed = 0; committed < simulations;) {
      const std::uint32_t cap =
          std::min(config.max_in_flight, 1 + committed / config.visits_per_flight);
      if (begun == simulations || out.size() >= cap || blocked) {
        commit(out.front());
        out.erase(out.begin());
        committed += 1;
        blocked = false;
        continue;
      }
      const std::size_t leaf = descend();
      blocked = nodes[leaf].pending;
      if (blocked) continue;
      begun += 1;
      if (nodes[leaf].end) {
        arrive(leaf, *nodes[leaf].end, false);
        committed += 1;
        continue;
      }
      nodes[leaf].pending = true;
      for (auto at = static_cast<std::int64_t>(leaf); at >= 0;) {
        nodes[static_cast<std::size_t>(at)].in_flight += 1;
        at = nodes[static_cast<std::size_t>(at)].parent;
      }
      out.push_back(leaf);
    }
  }

  ForestConfig config;
  std::vector<Node> nodes{};
};

void check_same(const TreeColumns& ours, const Plain& plain) {
  CHECK(ours.node.size() == plain.nodes.size());
  for (std::size_t i = 0; i < plain.nodes.size(); ++i) {
    const Plain::Node& node = plain.nodes[i];
    CHECK(ours.parent[i] == node.parent && ours.handle[i] == node.handle);
    CHECK(ours.visits[i] == node.visits && ours.total[i] == node.total);
    CHECK(ours.in_flight[i] == 0 && (ours.terminal[i] != 0) == node.end.has_value());
    CHECK(ours.depth[i] == (i == 0 ? 0 : ours.depth[static_cast<std::size_t>(node.parent)] + 1));
  }
}

void check_counters(const Forest& forest, std::size_t in_flight, std::uint64_t failures) {
  const Counters counters = forest.counters();
  std::uint64_t simulations = 0, nodes = 0, finished = 0;
  for (std::uint32_t tree = 0; tree < counters.trees; ++tree) {
    const TreeColumns columns = forest.columns(tree);
    simulations += columns.visits[0];
    nodes += columns.node.size();
    finished += forest.is_finished(tree);
  }
  CHECK(counters.simulations == simulations && counters.nodes == nodes);
  CHECK(counters.finished == finished && counters.in_flight == in_flight);
  CHECK(counters.failures == failures && counters.given_up == 0);
}

// Batches of random size, results in random order, some failures.
void grows_the_plain_trees(unsigned seed) {
  std::mt19937 random(seed);
  ForestConfig config;
  config.select.c_uct = seed % 4 == 0 ? 0.2 : 1.4;
  config.max_in_flight = seed % 3 == 0 ? 1 : 2 + seed % 7;
  config.visits_per_flight = 1 + seed % 5;
  config.max_attempts = 100;
  Forest forest(config);
  for (std::uint32_t tree = 0; tree < 12; ++tree) forest.add_tree(tree + 1, 3 + 9 * tree);
  Out out;
  std::uint64_t failures = 0;
  while (forest.counters().finished < 12) {
    const std::size_t most = random() % 60;
    const Leaves leaves = forest.ask(most);
    CHECK(leaves.size() <= most);
    const Out now = out_of(leaves);
    out.insert(out.end(), now.begin(), now.end());
    std::shuffle(out.begin(), out.end(), random);
    if (seed % 2 == 0 && !out.empty() && random() % 3 == 0) {
      forest.fail({&out.back().first, 1});
      out.pop_back();
      failures += 1;
    }
    const auto count = static_cast<std::ptrdiff_t>(random() % (out.size() + 1));
    forest.tell(told({out.end() - count, out.end()}).results());
    out.erase(out.end() - count, out.end());
    if (random() % 8 == 0) check_counters(forest, out.size(), failures);
  }
  CHECK(forest.counters().waiting == 0);
  for (std::uint32_t tree = 0; tree < 12; ++tree) {
    Plain plain{config};
    plain.run(tree + 1, 3 + 9 * tree);
    check_same(forest.columns(tree), plain);
  }
}

void a_forest_of_thousands_keeps_its_memory_apart() {
  Forest forest({});
  for (int tree = 0; tree < 5000; ++tree) forest.add_tree(tree, 4);
  while (forest.counters().finished < 5000) {
    forest.tell(told(out_of(forest.ask(700))).results());
  }
  for (std::uint32_t tree = 0; tree < 5000; tree += 7) {
    const TreeColumns columns = forest.columns(tree);
    CHECK(columns.handle[0] == tree && columns.visits[0] == 4 && columns.parent[0] == -1);
    forest.remove_tree(tree);
  }
  CHECK(forest.counters().trees == 5000 - 715 && forest.counters().finished == 5000 - 715);
}

ForestConfig three_at_once() {
  ForestConfig config;
  config.max_in_flight = 3;
  config.visits_per_flight = 1;
  config.max_attempts = 2;
  config.failed_value = -2.0;
  return config;
}

// Root with five children; of the tickets 1, 2 and 3 at the first of them, 1 is an end.
Forest with_three_out(ForestConfig config = three_at_once()) {
  Forest forest(config);
  forest.add_tree(7, 20);
  Told root;
  root.add(forest.ask(9).ticket.at(0), 0.5, {10, 11, 12, 13, 14});
  forest.tell(root.results());
  CHECK(forest.ask(9).size() == 2);  // 1 + 1 visit
  tell_one(forest, nth(1), 0.25, 0);
  CHECK(forest.ask(9).size() == 2);  // 1 + 2 visits
  return forest;                     // 2, 3 and 4 are out
}

void leaves_say_where_they_lie() {
  Forest forest(three_at_once());
  forest.add_tree(6, 20);
  forest.add_tree(7, 20);  // in the second slab
  forest.remove_tree(0);
  const Leaves root = forest.ask(9);
  CHECK(root.size() == 1 && root.ticket[0] == nth(0, 1) && root.tree[0] == 1);
  CHECK(root.node[0] == 0 && root.depth[0] == 0 && root.handle[0] == 7 && root.attempt[0] == 1);
  Told one;
  one.add(root.ticket[0], 0.5, {10, 11});
  forest.tell(one.results());
  const Leaves next = forest.ask(1);
  CHECK(next.size() == 1 && next.ticket[0] == nth(1, 1) && next.tree[0] == 1);
  CHECK(next.node[0] == 4 && next.depth[0] == 1 && next.handle[0] == 10);
  CHECK(forest.columns(1).in_flight == (std::vector<std::uint32_t>{1, 1, 0}));
}

void a_full_batch_leaves_other_trees_alone() {
  Forest forest({});
  for (int tree = 0; tree < 3; ++tree) forest.add_tree(tree, 5);
  CHECK(forest.ask(2).tree == (std::vector<tercet::TreeId>{0, 1}));
  CHECK(forest.columns(2).in_flight[0] == 0 && forest.status(2).in_flight == 0);
}

void results_wait_for_older_ones() {
  Forest forest = with_three_out();
  tell_one(forest, nth(4), 1.0, 2);
  tell_one(forest, nth(3), 1.0, 0);
  CHECK(forest.counters().waiting == 2 && forest.counters().simulations == 2);
  CHECK(forest.columns(0).visits[0] == 2);
  tell_one(forest, nth(2), 1.0, 0);  // gives room for a ticket; the others wait for that
  CHECK(forest.counters().waiting == 2 && forest.counters().simulations == 3);
  CHECK(forest.counters().evaluations == 3);
}

void a_blocked_tree_waits_for_its_leaf() {
  Forest forest(three_at_once());
  forest.add_tree(7, 20);
  tell_one(forest, forest.ask(9).ticket.at(0), 0.5, 1);
  CHECK(forest.ask(9).size() == 1);  // its child
  CHECK(forest.ask(9).size() == 0);  // pending, though two may be out
  CHECK(forest.columns(0).in_flight[0] == 1);
  tell_one(forest, nth(1), 0.5, 1);
  CHECK(forest.ask(9).size() == 1);
}

void an_end_is_visited_again() {
  Forest forest({});
  forest.add_tree(1, 10);
  tell_one(forest, forest.ask(1).ticket.at(0), 0.25, 0);
  CHECK(!forest.is_finished(0) && forest.ask(1).size() == 0 && forest.is_finished(0));
  const TreeColumns columns = forest.columns(0);
  CHECK(columns.visits[0] == 10 && columns.total[0] == 2.5 && columns.terminal[0] == 1);
  const Counters counters = forest.counters();
  CHECK(counters.simulations == 10 && counters.evaluations == 1 && counters.finished == 1);
}

void failed_leaves_are_handed_out_again_first() {
  Forest forest = with_three_out();
  forest.add_tree(8, 20);
  const Ticket failed[] = {nth(3), nth(2)};
  forest.fail(failed);
  CHECK(forest.counters().failures == 2 && forest.counters().in_flight == 1);
  CHECK_THROWS(forest.fail({failed, 1}), BadTicket);
  const Leaves one = forest.ask(1);
  CHECK(one.ticket == std::vector<Ticket>{nth(3)} && one.attempt[0] == 2 && one.handle[0] == 12);
  CHECK(forest.ask(9).ticket == (std::vector<Ticket>{nth(2), nth(0, 1)}));
  forest.fail({failed, 1});  // 3, for the second and last time
  CHECK(forest.counters().given_up == 1 && forest.counters().waiting == 1);
  forest.fail({failed + 1, 1});
  CHECK(forest.counters().given_up == 2 && forest.counters().failures == 4);
  const TreeColumns columns = forest.columns(0);
  CHECK(columns.total[0] == 0.75 - 2.0 && columns.terminal[2] == 1 && columns.total[2] == -2.0);
}

void a_leaf_that_is_given_up_has_no_children() {
  Forest forest({.max_in_flight = 2, .visits_per_flight = 1, .max_attempts = 1});
  forest.add_tree(7, 20);
  tell_one(forest, forest.ask(9).ticket.at(0), 0.5, 5);
  CHECK(forest.ask(9).size() == 2);
  tell_one(forest, nth(2), 0.5, 3);  // its memory serves a later ticket
  tell_one(forest, nth(1), 0.5, 0);
  while (forest.counters().finished == 0) {
    const Leaves leaves = forest.ask(9);
    std::vector<Ticket> newest_first(leaves.ticket.rbegin(), leaves.ticket.rend());
    for (const Ticket& ticket : newest_first) forest.fail({&ticket, 1});
  }
  CHECK(forest.counters().nodes == 9);
}

void removed_trees_take_their_tickets_along() {
  Forest forest = with_three_out();
  forest.add_tree(8, 20);
  CHECK(forest.ask(9).size() == 1);
  const Ticket failed[] = {nth(2), nth(0, 1)};
  forest.fail(failed);
  tell_one(forest, nth(4), 0.5, 2);
  forest.remove_tree(0);
  const Counters counters = forest.counters();
  CHECK(counters.trees == 1 && counters.finished == 0 && counters.nodes == 1);
  CHECK(counters.in_flight == 0 && counters.waiting == 0);
  CHECK(forest.ask(9).ticket == (std::vector<Ticket>{nth(0, 1)}));
  CHECK_THROWS(tell_one(forest, nth(3), 0.5, 2), BadTicket);
  CHECK_THROWS(forest.remove_tree(0), std::out_of_range);
  CHECK_THROWS(forest.columns(2), std::out_of_range);
  CHECK_THROWS((void)forest.is_finished(0), std::out_of_range);
}

void removed_trees_make_room() {
  const std::size_t slabs = tercet::Nodes::kChunk / tercet::Nodes::kSlab;
  ForestConfig config;
  config.max_bytes = tercet::Nodes::kChunk * tercet::Nodes::kBytesPerNode;
  config.max_in_flight = 2;
  config.visits_per_flight = 1;
  Forest forest(config);
  forest.add_tree(1, 20);
  tell_one(forest, forest.ask(9).ticket.at(0), 0.5, 2);
  CHECK(forest.ask(9).size() == 2);
  tell_one(forest, nth(2), 0.5, 64);  // its slab is kept free
  for (std::size_t tree = 2; tree < slabs; ++tree) forest.add_tree(1, 5);
  CHECK_THROWS(forest.add_tree(1, 5), std::length_error);
  CHECK_THROWS(tell_one(forest, nth(1), 0.5, 1), std::length_error);
  CHECK(forest.counters().trees == slabs - 1 && forest.counters().in_flight == 1);
  forest.remove_tree(5);
  tell_one(forest, nth(1), 0.5, 64);
  CHECK_THROWS(forest.add_tree(1, 5), std::length_error);
  forest.remove_tree(0);
  forest.add_tree(1, 5);
  const auto is_full = [&] {
    try {
      forest.add_tree(1, 5);
    } catch (const std::length_error&) {
      return true;
    }
    return false;
  };
  while (!is_full()) continue;
  tell_one(forest, forest.ask(1).ticket.at(0), 0.5, 0);  // an end needs no room
  CHECK(forest.counters().bytes == config.max_bytes);
}

// They would take all room in the end.
void ends_that_waited_leave_nothing_behind() {
  ForestConfig config = three_at_once();
  config.max_bytes = tercet::Nodes::kChunk * tercet::Nodes::kBytesPerNode;
  Forest forest(config);
  for (tercet::TreeId tree = 0; tree < tercet::Nodes::kChunk / tercet::Nodes::kSlab; ++tree) {
    forest.add_tree(1, 3);
    tell_one(forest, forest.ask(9).ticket.at(0), 0.5, 2);
    CHECK(forest.ask(9).size() == 2);
    tell_one(forest, nth(2, tree), 0.5, 0);  // waits
    tell_one(forest, nth(1, tree), 0.5, 0);
    forest.remove_tree(tree);
  }
}

template <typename Use>
std::optional<TicketFault> fault_of(const Use& use) {
  try {
    use();
  } catch (const BadTicket& e) {
    return e.fault;
  }
  return std::nullopt;
}

void bad_tickets_change_nothing() {
  Forest forest = with_three_out();
  forest.add_tree(8, 20);
  forest.remove_tree(1);
  const std::pair<Ticket, TicketFault> cases[] = {
      {nth(0, 7), TicketFault::kUnknown}, {nth(0, 2), TicketFault::kUnknown},
      {nth(5), TicketFault::kUnknown},    {nth(2) | 1, TicketFault::kUnknown} /* to expand */,
      {nth(1), TicketFault::kRepeated},   {nth(3), TicketFault::kRepeated} /* twice */,
      {nth(0, 1), TicketFault::kLate},    {0xffffffffu, TicketFault::kUnknown},
  };
  for (const auto& [bad, fault] : cases) {
    const std::vector<Ticket> tickets{nth(3), nth(4), bad};
    Told all;
    for (const Ticket ticket : tickets) all.add(ticket, 0.0, {1});
    CHECK(fault_of([&] { forest.tell(all.results()); }) == fault);
    CHECK(fault_of([&] { forest.fail(tickets); }) == fault);
    CHECK(fault_of([&] { forest.cancel(tickets); }) == fault);
    CHECK(forest.counters().in_flight == 3 && forest.counters().waiting == 0);
    CHECK(forest.counters().failures == 0 && forest.counters().cancelled == 0);
  }
  std::optional<BadTicket> bad;
  try {
    tell_one(forest, nth(5, 7), 0.0, 0);
  } catch (const BadTicket& e) {
    bad = e;
  }
  CHECK(bad && bad->ticket == nth(5, 7));
  const std::string said = "Forest: ticket " + std::to_string(nth(5, 7)) + " of tree 7 was never";
  CHECK(std::string(bad->what()).starts_with(said));
  tell_one(forest, nth(3), 0.0, 1);
  CHECK(fault_of([&] { tell_one(forest, nth(3), 0.0, 1); }) == TicketFault::kRepeated);
}

void results_that_cannot_be_are_refused() {
  Forest forest = with_three_out();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double value : {nan, 1e301, -1e301, HUGE_VAL}) {
    CHECK_THROWS(tell_one(forest, nth(2), value, 1), std::invalid_argument);
  }
  CHECK_THROWS(tell_one(forest, nth(2), 0.0, 65), std::invalid_argument);
  Told two;
  two.add(nth(2), 0.0, {1});
  two.add(nth(3), 0.0, {});
  const auto refuses = [&](const auto& change) {
    Told changed = two;
    change(changed);
    CHECK_THROWS(forest.tell(changed.results()), std::invalid_argument);
  };
  refuses([](Told& t) { t.values.pop_back(); });
  refuses([](Told& t) { t.values.push_back(0.0); });
  refuses([](Told& t) { t.counts.pop_back(); });
  refuses([](Told& t) { t.counts.push_back(0); });
  refuses([](Told& t) { t.handles.push_back(0); });
  refuses([](Told& t) { t.handles.clear(); });
  refuses([&](Told& t) { t.values[1] = nan; });
  CHECK(forest.counters().in_flight == 3);
  two.values = {kMaxValue, -kMaxValue};
  forest.tell(two.results());
}

void settings_out_of_range_are_refused() {
  const auto refuses = [](const ForestConfig& config) {
    CHECK_THROWS(Forest(config), std::invalid_argument);
  };
  const double infinity = std::numeric_limits<double>::infinity();
  refuses({.select = {.c_uct = -1.0}});
  refuses({.select = {.c_uct = infinity}});
  refuses({.max_in_flight = 0});
  refuses({.max_in_flight = 256});
  refuses({.visits_per_flight = 0});
  refuses({.max_attempts = 0});
  refuses({.failed_value = infinity});
  Forest forest({.select = {.c_uct = 0.0}, .max_in_flight = 255});
  CHECK_THROWS(forest.add_tree(1, 0), std::invalid_argument);
  CHECK_THROWS(forest.add_tree(1, kMaxVisits + 1), std::invalid_argument);
  forest.add_tree(1, kMaxVisits);
}

void sums_of_the_greatest_values_are_finite() {
  CHECK(std::isfinite(kMaxValue * kMaxVisits) && std::isfinite(2 * kMaxValue * kMaxVisits));
}

// 255 tickets of one tree are out, and come back newest first.
void the_greatest_cap_holds() {
  Forest forest({.max_in_flight = 255, .visits_per_flight = 1});
  forest.add_tree(3, 1500);
  std::size_t most = 0;
  while (!forest.is_finished(0)) {
    const Leaves leaves = forest.ask(1000);
    most = std::max(most, leaves.size());
    CHECK(forest.columns(0).in_flight[0] == leaves.size());
    Told results;
    for (std::size_t i = leaves.size(); i-- > 0;) {
      results.add(leaves.ticket[i], 0.5, std::vector<std::int64_t>(60));
    }
    forest.tell(results.results());
  }
  CHECK(most == 255 && forest.columns(0).visits[0] == 1500);
}

// Runs `use` with memory for `allowed` allocations; whether it was enough.
template <typename Use>
bool within(std::int64_t& allowed, const Use& use) {
  allocations_left = allowed;
  bool enough = true;
  try {
    use();
  } catch (const std::bad_alloc&) {
    enough = false;
  }
  allowed = enough ? allocations_left : kUnlimited;
  allocations_left = kUnlimited;
  return enough;
}

// Grows four trees, with memory for so many allocations until one fails; whether one did.
// Sets `torn` where the forest says that it cannot go on.
bool grown_within(std::int64_t allowed, bool& torn) {
  ForestConfig config = three_at_once();
  config.max_attempts = 50;
  Forest forest(config);
  bool enough = true;
  const auto insist = [&](const auto& use) {
    if (within(allowed, use)) return;
    enough = false;
    use();
  };
  try {
    for (int tree = 0; tree < 4; ++tree) insist([&] { forest.add_tree(tree + 1, 12); });
    for (int round = 0; forest.counters().finished < 4; ++round) {
      Leaves leaves;
      insist([&] { leaves = forest.ask(5); });
      Out out = out_of(leaves);
      std::reverse(out.begin(), out.end());
      if (round % 3 == 0 && out.size() > 1) {
        insist([&] { forest.fail({&out.back().first, 1}); });
        out.pop_back();
      }
      const Told results = told(out);
      insist([&] { forest.tell(results.results()); });
    }
    for (std::uint32_t tree = 0; tree < 4; ++tree) {
      Plain plain{config};
      plain.run(tree + 1, 12);
      check_same(forest.columns(tree), plain);
      insist([&] { forest.remove_tree(tree); });
    }
    CHECK(forest.counters().nodes == 0 && forest.counters().trees == 0);
  } catch (const std::runtime_error&) {
    CHECK(!enough);
    CHECK_THROWS(forest.add_tree(1, 1), std::runtime_error);
    CHECK_THROWS(forest.ask(1), std::runtime_error);
    CHECK_THROWS(forest.tell({}), std::runtime_error);
    CHECK_THROWS(forest.fail({}), std::runtime_error);
    CHECK_THROWS(forest.columns(0), std::runtime_error);
    CHECK_THROWS(forest.counters(), std::runtime_error);
    CHECK_THROWS(tercet::Snapshot::of(forest), std::runtime_error);
    torn = true;
  }
  return !enough;
}

void memory_that_runs_out_changes_nothing_or_is_said_ever_after() {
  int torn = 0, whole = 0;
  for (std::int64_t allowed = 0;; ++allowed) {
    bool says_torn = false;
    if (!grown_within(allowed, says_torn)) break;
    (says_torn ? torn : whole) += 1;
  }
  CHECK(torn > 20 && whole > 20);
}

void memory_that_runs_out_in_a_refusal_changes_nothing() {
  Forest forest = with_three_out();
  Told both;
  both.add(nth(3), 0.0, {1});
  both.add(nth(77), 0.0, {1});
  int failures = 0;
  for (bool refused = false; !refused; ++failures) {
    std::int64_t allowed = failures;
    try {
      within(allowed, [&] { forest.tell(both.results()); });
    } catch (const BadTicket&) {
      refused = true;
    }
    allocations_left = kUnlimited;
    CHECK(forest.counters().in_flight == 3);
  }
  CHECK(failures > 1);
  tell_one(forest, nth(3), 0.0, 1);
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 12; ++seed) grows_the_plain_trees(seed);
  a_forest_of_thousands_keeps_its_memory_apart();
  leaves_say_where_they_lie();
  a_full_batch_leaves_other_trees_alone();
  results_wait_for_older_ones();
  a_blocked_tree_waits_for_its_leaf();
  an_end_is_visited_again();
  failed_leaves_are_handed_out_again_first();
  a_leaf_that_is_given_up_has_no_children();
  removed_trees_take_their_tickets_along();
  removed_trees_make_room();
  ends_that_waited_leave_nothing_behind();
  bad_tickets_change_nothing();
  results_that_cannot_be_are_refused();
  settings_out_of_range_are_refused();
  sums_of_the_greatest_values_are_finite();
  the_greatest_cap_holds();
  memory_that_runs_out_changes_nothing_or_is_said_ever_after();
  memory_that_runs_out_in_a_refusal_changes_nothing();
}
