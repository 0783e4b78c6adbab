#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "tercet/tree.hpp"

using tercet::kRoot;
using tercet::NodeId;
using tercet::Tree;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

NodeId after(NodeId id, std::uint32_t offset) {
  return NodeId{static_cast<std::uint32_t>(id) + offset};
}

void rejects_bad_arguments() {
  CHECK_THROWS(Tree(-1.0), std::invalid_argument);
  CHECK_THROWS(Tree(kNan), std::invalid_argument);
  Tree tree(1.0);
  CHECK_THROWS(tree.expand(kRoot, 0), std::invalid_argument);
  CHECK_THROWS(tree.expand(NodeId{1}, 2), std::out_of_range);
  CHECK_THROWS(tree.select_child(kRoot), std::logic_error);
  CHECK_THROWS(tree.backup(NodeId{7}, 1.0), std::out_of_range);
  CHECK_THROWS(tree.backup(kRoot, kNan), std::invalid_argument);
  tree.expand(kRoot, 2);
  CHECK_THROWS(tree.expand(kRoot, 2), std::logic_error);
  CHECK_THROWS(tree.expand(kRoot, std::numeric_limits<std::uint32_t>::max()), std::logic_error);
  CHECK(tree.size() == 3);
  CHECK(tree.hot(kRoot).visits == 0);
}

void rejects_more_nodes_than_an_index_can_name() {
  Tree tree(1.0);
  CHECK_THROWS(tree.expand(kRoot, std::numeric_limits<std::uint32_t>::max()), std::length_error);
  CHECK(tree.size() == 1);
  CHECK(tree.is_leaf(kRoot));
}

void children_lie_side_by_side() {
  Tree tree(1.0);
  const NodeId a = tree.expand(kRoot, 3);
  const NodeId b = tree.expand(after(a, 1), 2);
  CHECK(tree.size() == 6);
  CHECK(tree.cold(kRoot).num_children == 3);
  CHECK(tree.cold(after(a, 2)).parent == kRoot);
  CHECK(tree.cold(after(b, 1)).parent == after(a, 1));
  CHECK(tree.is_leaf(a));
  CHECK(!tree.is_leaf(after(a, 1)));
}

void backup_reaches_every_ancestor_and_no_other_node() {
  Tree tree(1.0);
  const NodeId a = tree.expand(kRoot, 2);
  const NodeId b = tree.expand(a, 1);
  tree.backup(b, 0.5);
  tree.backup(a, -1.0);
  CHECK(tree.hot(kRoot).visits == 2);
  CHECK(tree.hot(kRoot).total_value == -0.5);
  CHECK(tree.hot(a).visits == 2);
  CHECK(tree.hot(b).visits == 1);
  CHECK(tree.hot(b).total_value == 0.5);
  CHECK(tree.hot(after(a, 1)).visits == 0);
}

void selects_unvisited_first_then_the_highest_score_then_the_lowest_index() {
  Tree tree(0.0);
  const NodeId a = tree.expand(kRoot, 3);
  CHECK(tree.select_child(kRoot) == a);
  tree.backup(a, 1.0);
  CHECK(tree.select_child(kRoot) == after(a, 1));
  tree.backup(after(a, 1), 2.0);
  tree.backup(after(a, 2), 2.0);
  CHECK(tree.select_child(kRoot) == after(a, 1));
}

// Four visits of a, one of b, whose value is 0: the bounds are mean + sqrt(ln 5 / 4) = mean + 0.634
// and sqrt(ln 5) = 1.269.
NodeId chosen_by_bound(double mean) {
  Tree tree(1.0);
  const NodeId a = tree.expand(kRoot, 2);
  for (int i = 0; i < 4; ++i) tree.backup(a, mean);
  tree.backup(after(a, 1), 0.0);
  return tree.select_child(kRoot);
}

void selects_the_highest_upper_confidence_bound() {
  CHECK(chosen_by_bound(0.62) == NodeId{2});
  CHECK(chosen_by_bound(0.65) == NodeId{1});
}

void exploration_outweighs_value_when_c_is_large() {
  Tree tree(10.0);
  const NodeId a = tree.expand(kRoot, 2);
  for (int i = 0; i < 9; ++i) tree.backup(a, 1.0);
  tree.backup(after(a, 1), 0.0);
  CHECK(tree.select_child(kRoot) == after(a, 1));
}

void select_leaf_descends_to_the_frontier() {
  Tree tree(1.0);
  const NodeId a = tree.expand(kRoot, 2);
  const NodeId b = tree.expand(a, 2);
  CHECK(tree.select_leaf() == b);
}

}  // namespace

int main() {
  rejects_bad_arguments();
  rejects_more_nodes_than_an_index_can_name();
  children_lie_side_by_side();
  backup_reaches_every_ancestor_and_no_other_node();
  selects_unvisited_first_then_the_highest_score_then_the_lowest_index();
  selects_the_highest_upper_confidence_bound();
  exploration_outweighs_value_when_c_is_large();
  select_leaf_descends_to_the_frontier();
  return 0;
}
