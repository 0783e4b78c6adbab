#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "check.hpp"
#include "tercet/forest.hpp"

using tercet::Forest;
using tercet::Leaves;
using tercet::Ticket;
using tercet::TreeColumns;

namespace {

std::uint32_t hash(std::uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// A world that the handles decide: value and up to six children, none for every eighth leaf.
void tell(Forest& forest, const std::vector<std::pair<Ticket, std::int64_t>>& leaves) {
  std::vector<Ticket> tickets;
  std::vector<double> values;
  std::vector<std::uint32_t> counts;
  std::vector<std::int64_t> handles;
  for (const auto& [ticket, handle] : leaves) {
    const std::uint32_t state = hash(static_cast<std::uint32_t>(handle));
    tickets.push_back(ticket);
    values.push_back(state / 4294967296.0 - 0.5);
    counts.push_back(state % 8 == 0 ? 0 : 1 + state % 6);
    for (std::uint32_t i = 0; i < counts.back(); ++i) handles.push_back(hash(state + i));
  }
  forest.tell({tickets, values, counts, handles});
}

// Batches of random size, results in random order, some failures.
TreeColumns grown(unsigned seed, std::size_t most, bool failing) {
  std::mt19937 random(seed);
  tercet::ForestConfig config;
  config.max_in_flight = 5;
  config.visits_per_flight = 3;
  config.max_attempts = 100;
  Forest forest(config);
  for (int tree = 0; tree < 3; ++tree) forest.add_tree(tree + 1, 200);
  std::vector<std::pair<Ticket, std::int64_t>> out;
  while (forest.counters().finished < 3) {
    const Leaves leaves = forest.ask(random() % (most + 1));
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      out.emplace_back(leaves.ticket[i], leaves.handle[i]);
    }
    std::shuffle(out.begin(), out.end(), random);
    if (failing && !out.empty() && random() % 3 == 0) {
      const Ticket ticket = out.back().first;
      out.pop_back();
      forest.fail({&ticket, 1});
    }
    const auto told = static_cast<std::ptrdiff_t>(random() % (out.size() + 1));
    tell(forest, {out.end() - told, out.end()});
    out.erase(out.end() - told, out.end());
    CHECK(forest.counters().in_flight == out.size());
  }
  return forest.columns(1);
}

void order_of_results_and_failures_change_nothing() {
  const TreeColumns one = grown(1, 1, false);
  CHECK(one.visits[0] == 200 && one.node.size() > 200);
  for (unsigned seed = 2; seed < 20; ++seed) {
    const TreeColumns other = grown(seed, 1 + seed % 9, seed % 2 == 0);
    CHECK(one.parent == other.parent && one.visits == other.visits && one.total == other.total);
    CHECK(one.handle == other.handle && one.terminal == other.terminal && one.node == other.node);
  }
}

void a_forest_of_thousands_keeps_its_memory_apart() {
  Forest forest({});
  for (int tree = 0; tree < 5000; ++tree) forest.add_tree(tree, 4);
  while (forest.counters().finished < 5000) {
    const Leaves leaves = forest.ask(700);
    std::vector<std::pair<Ticket, std::int64_t>> out;
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      out.emplace_back(leaves.ticket[i], leaves.handle[i]);
    }
    tell(forest, out);
  }
  for (std::uint32_t tree = 0; tree < 5000; tree += 7) {
    const TreeColumns columns = forest.columns(tree);
    CHECK(columns.handle[0] == tree && columns.visits[0] == 4 && columns.parent[0] == -1);
    forest.remove_tree(tree);
  }
  CHECK(forest.counters().trees == 5000 - 715);
}

}  // namespace

int main() {
  order_of_results_and_failures_change_nothing();
  a_forest_of_thousands_keeps_its_memory_apart();
}
