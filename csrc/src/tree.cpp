#include "tercet/tree.hpp"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "tercet/select.hpp"

namespace tercet {

Tree::Tree(double c_uct) : hot_(1), cold_(1), c_uct_(c_uct) {
  if (!std::isfinite(c_uct) || c_uct < 0.0) {
    throw std::invalid_argument("Tree: c_uct must be finite and >= 0, got " +
                                std::to_string(c_uct));
  }
}

std::size_t Tree::checked(NodeId id) const {
  const auto index = static_cast<std::size_t>(id);
  if (index >= hot_.size()) {
    throw std::out_of_range("Tree: node must be < " + std::to_string(hot_.size()) + ", got " +
                            std::to_string(index));
  }
  return index;
}

const Tree::Hot& Tree::hot(NodeId id) const { return hot_[checked(id)]; }

const Tree::Cold& Tree::cold(NodeId id) const { return cold_[checked(id)]; }

NodeId Tree::expand(NodeId id, std::uint32_t num_children) {
  const std::size_t node = checked(id);
  if (num_children == 0) {
    throw std::invalid_argument("Tree::expand: num_children must be >= 1, got 0");
  }
  if (hot_[node].first_child != 0) {
    throw std::logic_error("Tree::expand: node " + std::to_string(node) + " is already expanded");
  }
  const std::size_t first = hot_.size();
  if (first + num_children > std::numeric_limits<std::uint32_t>::max()) {
    throw std::length_error("Tree::expand: a tree holds at most 2^32 - 1 nodes");
  }
  hot_.resize(first + num_children);
  cold_.resize(first + num_children, Cold{id, 0});
  hot_[node].first_child = static_cast<std::uint32_t>(first);
  cold_[node].num_children = num_children;
  return NodeId{static_cast<std::uint32_t>(first)};
}

std::size_t Tree::best_child(std::size_t node) const {
  const std::size_t first = hot_[node].first_child;
  const std::size_t end = first + cold_[node].num_children;
  const double log_parent = std::log(static_cast<double>(hot_[node].visits));
  std::size_t best = first;
  double best_score = -std::numeric_limits<double>::infinity();
  for (std::size_t child = first; child < end; ++child) {
    const Hot& c = hot_[child];
    if (c.visits == 0) return child;
    const double score = uct_score(c.total_value, c.visits, c.visits, log_parent, c_uct_);
    if (score > best_score) {
      best = child;
      best_score = score;
    }
  }
  return best;
}

NodeId Tree::select_child(NodeId id) const {
  const std::size_t node = checked(id);
  if (hot_[node].first_child == 0) {
    throw std::logic_error("Tree::select_child: node " + std::to_string(node) +
                           " has no children; call expand first");
  }
  return NodeId{static_cast<std::uint32_t>(best_child(node))};
}

NodeId Tree::select_leaf() const {
  std::size_t node = 0;
  while (hot_[node].first_child != 0) node = best_child(node);
  return NodeId{static_cast<std::uint32_t>(node)};
}

void Tree::backup(NodeId leaf, double value) {
  std::size_t node = checked(leaf);
  if (!std::isfinite(value)) {
    throw std::invalid_argument("Tree::backup: value must be finite, got " + std::to_string(value));
  }
  while (true) {
    hot_[node].total_value += value;
    hot_[node].visits += 1;
    if (node == 0) return;
    node = static_cast<std::size_t>(cold_[node].parent);
  }
}

}  // namespace tercet
