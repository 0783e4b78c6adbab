#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_tree(py::module_& m);

PYBIND11_MODULE(_mcts, m) {
  m.doc() = "The compiled search core: numbers only, never calls Python.";
  bind_tree(m);
}
