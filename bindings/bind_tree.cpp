#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "tercet/tree.hpp"

namespace py = pybind11;
using namespace py::literals;
using tercet::NodeId;
using tercet::Tree;

namespace {

// A copy, so that no view dangles after expand().
template <typename T, typename Field>
py::array_t<T> column(const Tree& tree, Field field) {
  py::array_t<T> out(static_cast<py::ssize_t>(tree.size()));
  auto view = out.template mutable_unchecked<1>();
  for (std::uint32_t i = 0; i < tree.size(); ++i) view(i) = tree.hot(NodeId{i}).*field;
  return out;
}

py::object children(const Tree& tree, std::uint32_t node) {
  const std::uint32_t first = tree.hot(NodeId{node}).first_child;
  const std::uint32_t end = first + tree.cold(NodeId{node}).num_children;
  return py::module_::import("builtins").attr("range")(first, end);
}

}  // namespace

void bind_tree(py::module_& m) {
  py::class_<Tree>(m, "Tree", "UCT search tree in one arena. Not thread-safe: one thread per tree.")
      .def(py::init<double>(), py::kw_only(), "c_uct"_a)
      .def(
          "expand",
          [](Tree& t, std::uint32_t node, std::uint32_t num_children) {
            return static_cast<std::uint32_t>(t.expand(NodeId{node}, num_children));
          },
          "node"_a, "num_children"_a, "Adds children and returns the first; the others follow it.")
      .def(
          "select_child",
          [](const Tree& t, std::uint32_t node) {
            return static_cast<std::uint32_t>(t.select_child(NodeId{node}));
          },
          "node"_a, "The child with the highest UCB1 score; lowest index on ties.")
      .def(
          "select_leaf", [](const Tree& t) { return static_cast<std::uint32_t>(t.select_leaf()); },
          "Follows select_child from the root to a node without children.")
      .def(
          "backup",
          [](Tree& t, std::uint32_t leaf, double value) { t.backup(NodeId{leaf}, value); },
          "leaf"_a, "value"_a, "Adds value to the leaf and all its ancestors.")
      .def("children", &children, "node"_a, "Range of the node's children; empty for a leaf.")
      .def(
          "parent",
          [](const Tree& t, std::uint32_t node) {
            return static_cast<std::uint32_t>(t.cold(NodeId{node}).parent);
          },
          "node"_a, "Parent of a node; the root is its own.")
      .def(
          "visits", [](const Tree& t) { return column<std::uint32_t>(t, &Tree::Hot::visits); },
          "Finished backups through each node, uint32[nodes].")
      .def(
          "total_values", [](const Tree& t) { return column<double>(t, &Tree::Hot::total_value); },
          "Sum of the values backed up through each node, float64[nodes].")
      .def("__len__", &Tree::size);
}
