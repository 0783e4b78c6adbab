#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tercet/nodes.hpp"

using tercet::HotNode;
using tercet::NodeIndex;
using tercet::Nodes;
using tercet::Slabs;

namespace {

constexpr std::size_t kChunkBytes = Nodes::kChunk * Nodes::kBytesPerNode;

std::vector<std::int64_t> handles(std::size_t n, std::int64_t first) {
  std::vector<std::int64_t> found(n);
  std::iota(found.begin(), found.end(), first);
  return found;
}

void counts_and_links_share_eight_bytes() {
  HotNode node;
  CHECK(node.is_leaf() && !node.has_children() && !node.is_last());
  node.set_last();
  CHECK(node.is_leaf() && node.is_last());
  for (std::uint32_t i = 0; i < tercet::kMaxInFlight; ++i) node.depart();
  CHECK(node.in_flight() == tercet::kMaxInFlight && node.visits() == 0);
  node.arrive(0.5);
  node.turn_back();
  CHECK(node.in_flight() == tercet::kMaxInFlight - 2 && node.visits() == 1 && node.total == 0.5);
  CHECK(node.expected_visits() == tercet::kMaxInFlight - 1);
  node.set_asked(true);
  CHECK(node.is_asked() && node.is_last() && node.is_leaf() && !node.has_children());
  node.set_first_child(tercet::kMaxNodes - 4);
  CHECK(node.has_children() && node.first_child() == tercet::kMaxNodes - 4 && !node.is_leaf());
  CHECK(node.is_last() && node.is_asked() && !node.is_terminal() && !node.is_closed());
  node.set_first_child(0);  // of a block in the first slab
  CHECK(node.has_children() && node.first_child() == 0 && !node.is_leaf());
  node.set_asked(false);
  node.set_last(false);
  CHECK(!node.is_asked() && !node.is_last() && node.has_children() && !node.is_closed());
  CHECK(!node.is_leaf());
  node.set_closed();
  node.set_end(12345);
  CHECK(node.is_terminal() && node.end() == 12345 && node.is_closed() && !node.has_children());
  node.set_end(0);
  CHECK(node.is_terminal() && node.end() == 0 && !node.is_leaf() && !node.is_asked());
  CHECK(node.is_closed() && !node.is_last());
}

void blocks_of_two_trees_lie_in_their_own_slabs() {
  Nodes nodes(kChunkBytes);
  Slabs a, b;
  const NodeIndex root_a = nodes.add_root(a, 10);
  const NodeIndex root_b = nodes.add_root(b, 20);
  CHECK(nodes.local(root_a) == 0 && nodes.local(root_b) == 0);
  CHECK(nodes.parent(root_b) == root_b && nodes.handle(root_b) == 20);
  const NodeIndex first = nodes.add_children(a, root_a, handles(5, 100));
  const NodeIndex other = nodes.add_children(b, root_b, handles(64, 200));
  CHECK(nodes.local(first) == 4 && first % 4 == 0);
  CHECK(nodes.local(other) == Nodes::kSlab);  // the first slab has not room for 64
  for (std::uint32_t i = 0; i < 64; ++i) {
    CHECK(nodes.parent(other + i) == root_b && nodes.handle(other + i) == 200 + i);
    CHECK(nodes.hot(other + i).is_last() == (i == 63) && nodes.hot(other + i).is_leaf());
  }
  CHECK(nodes.hot(root_a).first_child() == first && nodes.hot(first + 4).is_last());
  const NodeIndex next = nodes.add_children(a, first + 4, handles(1, 300));
  CHECK(nodes.local(next) == 12 && nodes.parent(next) == first + 4);
  std::vector<std::int64_t> names;
  for (const NodeIndex node : nodes.all(a)) names.push_back(nodes.handle(node));
  CHECK((names == std::vector<std::int64_t>{10, 100, 101, 102, 103, 104, 300}));
  CHECK(nodes.all(b).size() == 65);
}

void a_layout_adds_columns_and_room_to_grow() {
  const tercet::Layout layout{.priors = true, .cold = true, .channels = 2, .room = 6};
  Nodes nodes(3 * kChunkBytes, layout);
  CHECK(nodes.bytes_per_node() == 25 + 4 + 16 + 16);
  Slabs slabs;
  const NodeIndex root = nodes.add_root(slabs, 1);
  const NodeIndex first = nodes.add_children(slabs, root, handles(2, 10));
  CHECK(nodes.local(first) == 8 && nodes.num_children(root) == 2);
  const NodeIndex below = nodes.add_children(slabs, first, handles(7, 50));
  CHECK(nodes.local(below) == 16);
  for (const NodeIndex node : nodes.all(slabs)) {
    CHECK(std::isnan(nodes.cold(node).own) && std::isnan(nodes.cold(node).verdict));
    CHECK(!nodes.cold(node).is_full && *nodes.priors(node) == 0.0f);
    CHECK(nodes.channels(node).size() == 2 && nodes.channels(node)[1] == 0.0);
    nodes.channels(node)[1] = nodes.cold(node).own = *nodes.priors(node) = 7;
  }
  nodes.append_children(root, handles(3, 12));
  CHECK(nodes.num_children(root) == 5 && !nodes.hot(first + 1).is_last());
  CHECK(nodes.hot(first + 4).is_last() && nodes.handle(first + 4) == 14);
  CHECK(nodes.channels(first + 2)[1] == 0.0 && nodes.parent(first + 4) == root);
  std::vector<std::int64_t> names;
  for (const NodeIndex node : nodes.all(slabs)) names.push_back(nodes.handle(node));
  CHECK((names == std::vector<std::int64_t>{1, 10, 11, 12, 13, 14, 50, 51, 52, 53, 54, 55, 56}));
  Slabs more;
  for (std::size_t i = 1; i < Nodes::kChunk / Nodes::kSlab; ++i) nodes.add_root(more = {}, 1);
  CHECK_THROWS(nodes.add_root(more = {}, 1), std::length_error);
}

void released_slabs_are_used_again_and_the_limit_holds() {
  Nodes nodes(kChunkBytes);
  CHECK(nodes.bytes() == 0);
  std::vector<Slabs> trees(Nodes::kChunk / Nodes::kSlab);
  for (Slabs& tree : trees) nodes.add_root(tree, 1);
  CHECK(nodes.bytes() == kChunkBytes);
  Slabs more;
  CHECK_THROWS(nodes.add_root(more, 1), std::length_error);
  CHECK(more.count == 0);
  CHECK_THROWS(nodes.add_children(trees[0], 0, handles(64, 0)), std::length_error);
  CHECK(nodes.hot(0).is_leaf() && trees[0].count == 1);
  nodes.release(trees[7]);
  nodes.reserve(1);
  CHECK_THROWS(nodes.reserve(2), std::length_error);
  const NodeIndex root = nodes.add_root(more, 5);
  CHECK(root == 7 * Nodes::kSlab && nodes.hot(root).is_leaf() && nodes.local(root) == 0);
}

void memory_that_was_used_looks_like_new() {
  Nodes nodes(kChunkBytes);
  Slabs old;
  const NodeIndex first_root = nodes.add_root(old, 9);
  const NodeIndex children = nodes.add_children(old, first_root, handles(60, 1));
  CHECK(old.count == 1);  // a slab is full to its last node
  for (NodeIndex node = first_root; node < children + 60; ++node) {
    nodes.hot(node).depart();
    nodes.hot(node).arrive(1.0);
    nodes.hot(node).set_end(1);
    nodes.hot(node).set_last();
  }
  nodes.release(old);
  Slabs fresh;
  const NodeIndex root = nodes.add_root(fresh, 7);
  CHECK(root == first_root && nodes.add_children(fresh, root, handles(5, 10)) == root + 4);
  const std::vector<std::int64_t> names{7, 0, 0, 0, 10, 11, 12, 13, 14, 0, 0, 0};
  for (std::uint32_t i = 0; i < names.size(); ++i) {
    const HotNode& node = nodes.hot(root + i);
    CHECK(node.total == 0.0 && node.expected_visits() == 0 && nodes.handle(root + i) == names[i]);
    CHECK(node.has_children() == (i == 0) && node.is_last() == (i == 0 || i == 8));
    CHECK(!node.is_terminal() && nodes.parent(root + i) == root);
  }
}

void trees_of_many_slabs_share_two_chunks() {
  constexpr std::size_t kSlabs = Nodes::kChunk / Nodes::kSlab;
  Nodes nodes(2 * kChunkBytes);
  Slabs trees[2];
  NodeIndex last[2];
  for (int i = 0; i < 2; ++i) last[i] = nodes.add_root(trees[i], i);
  for (std::uint32_t round = 0; round < kSlabs * 3 / 4; ++round) {
    for (int i = 0; i < 2; ++i) {
      last[i] = nodes.add_children(trees[i], last[i], handles(round % 2 == 0 ? 64 : 40, round));
      CHECK(nodes.local(last[i]) == (round + 1) * Nodes::kSlab);
    }
  }
  CHECK(nodes.bytes() == 2 * kChunkBytes);
  for (int i = 0; i < 2; ++i) {
    const std::vector<NodeIndex> all = nodes.all(trees[i]);
    CHECK(all.size() == 1 + kSlabs * 3 / 8 * 104 && nodes.handle(all[0]) == i);
    for (std::size_t k = 1; k < all.size(); ++k)
      CHECK(nodes.local(all[k - 1]) < nodes.local(all[k]));
  }
  const std::size_t left = 2 * kSlabs - trees[0].count - trees[1].count;
  nodes.release(trees[0]);
  nodes.reserve(left + trees[0].count);
  CHECK_THROWS(nodes.reserve(left + trees[0].count + 1), std::length_error);
  std::vector<bool> taken(2 * kSlabs);
  for (const NodeIndex node : nodes.all(trees[1])) taken[node / Nodes::kSlab] = true;
  for (std::size_t i = 0; i < left + trees[0].count; ++i) {
    Slabs other;
    const NodeIndex root = nodes.add_root(other, 1);
    CHECK(!taken[root / Nodes::kSlab]);
    taken[root / Nodes::kSlab] = true;
  }
}

// A root with two children, of which the second has two of its own.
void a_copied_subtree_has_all_columns() {
  Nodes nodes(3 * kChunkBytes, {.priors = true, .cold = true, .channels = 2});
  Slabs slabs, copied;
  const NodeIndex root = nodes.add_root(slabs, 1);
  const NodeIndex second = nodes.add_children(slabs, root, handles(2, 10)) + 1;
  const NodeIndex below = nodes.add_children(slabs, second, handles(2, 20));
  for (const NodeIndex node : {second, below, below + 1}) {
    nodes.hot(node).depart();
    nodes.hot(node).arrive(node);
    *nodes.priors(node) = static_cast<float>(node) / 64.0f;
    nodes.cold(node).own = node + 0.5;
    nodes.cold(node).is_full = node == second;
    nodes.channels(node)[0] = node + 0.25;
    nodes.channels(node)[1] = node + 0.75;
  }
  nodes.hot(below).set_closed();
  const NodeIndex top = nodes.copy(nodes.all(slabs), second, copied);
  CHECK(nodes.local(top) == 0 && nodes.parent(top) == top && nodes.hot(top).is_last());
  CHECK(nodes.all(copied).size() == 3 && nodes.num_children(top) == 2);
  const NodeIndex first = nodes.hot(top).first_child();
  CHECK(first != below && nodes.parent(first) == top && nodes.parent(first + 1) == top);
  const NodeIndex pairs[][2] = {{second, top}, {below, first}, {below + 1, first + 1}};
  for (const auto& [from, to] : pairs) {
    CHECK(nodes.handle(to) == nodes.handle(from) && nodes.hot(to).total == from);
    CHECK(nodes.hot(to).visits() == 1 && *nodes.priors(to) == *nodes.priors(from));
    CHECK(nodes.cold(to).own == from + 0.5 && nodes.cold(to).is_full == (from == second));
    CHECK(nodes.channels(to)[0] == from + 0.25 && nodes.channels(to)[1] == from + 0.75);
  }
  CHECK(nodes.hot(first).is_closed() && !nodes.hot(first).is_last());
  CHECK(nodes.hot(first + 1).is_last() && !nodes.hot(first + 1).is_closed());
}

void a_reservation_may_need_several_chunks() {
  Nodes nodes(2 * kChunkBytes);
  nodes.reserve(Nodes::kChunk / Nodes::kSlab + 1);
  CHECK(nodes.bytes() == 2 * kChunkBytes);
}

}  // namespace

int main() {
  a_reservation_may_need_several_chunks();
  memory_that_was_used_looks_like_new();
  a_copied_subtree_has_all_columns();
  trees_of_many_slabs_share_two_chunks();
  counts_and_links_share_eight_bytes();
  a_layout_adds_columns_and_room_to_grow();
  blocks_of_two_trees_lie_in_their_own_slabs();
  released_slabs_are_used_again_and_the_limit_holds();
}
