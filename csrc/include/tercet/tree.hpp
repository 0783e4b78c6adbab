// A search tree in one arena; nodes are named by index.
//
// Source: Kocsis & Szepesvari 2006, UCB1 applied to trees:
//   score(c) = W_c / N_c + c_uct * sqrt(ln N_parent / N_c),   unvisited children first.
//
// Layout: the children of a node lie in one block, so that a selection step reads consecutive
// memory. What selection reads is hot (16 bytes, four children per cache line); the rest is apart.
//
//   hot_   | root | a0 a1 a2 | b0 b1 | ...      total value, visits, first child
//   cold_  | root | a0 a1 a2 | b0 b1 | ...      parent, number of children
//
// Not thread-safe: one thread per Tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tercet {

enum class NodeId : std::uint32_t {};  // index into the arena; never reused
inline constexpr NodeId kRoot{0};

class Tree {
 public:
  struct Hot {
    double total_value{0.0};       // sum of the values backed up, root player's view
    std::uint32_t visits{0};       // finished backups through this node
    std::uint32_t first_child{0};  // 0: not expanded (the root is nobody's child)
  };
  static_assert(sizeof(Hot) == 16);

  struct Cold {
    NodeId parent{kRoot};  // the root is its own parent
    std::uint32_t num_children{0};
  };

  explicit Tree(double c_uct);  // throws std::invalid_argument unless c_uct is finite and >= 0

  // Adds num_children children and returns the first; the others follow it.
  // Throws std::invalid_argument if num_children is 0, std::logic_error if already expanded,
  // std::length_error if the arena would outgrow 32-bit indices.
  NodeId expand(NodeId id, std::uint32_t num_children);

  // The child with the highest score; lowest index on ties. Throws std::logic_error on a leaf.
  [[nodiscard]] NodeId select_child(NodeId id) const;

  // Follows select_child from the root to a node without children.
  [[nodiscard]] NodeId select_leaf() const;

  // Adds value to the leaf and all its ancestors. Throws std::invalid_argument unless finite.
  void backup(NodeId leaf, double value);

  // All three throw std::out_of_range for an unknown node.
  [[nodiscard]] const Hot& hot(NodeId id) const;
  [[nodiscard]] const Cold& cold(NodeId id) const;
  [[nodiscard]] bool is_leaf(NodeId id) const { return hot(id).first_child == 0; }

  [[nodiscard]] std::size_t size() const noexcept { return hot_.size(); }

 private:
  [[nodiscard]] std::size_t checked(NodeId id) const;
  [[nodiscard]] std::size_t best_child(std::size_t node) const;

  std::vector<Hot> hot_;
  std::vector<Cold> cold_;
  double c_uct_;
};

}  // namespace tercet
