#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_forest(py::module_& m);
void bind_reward(py::module_& m);

PYBIND11_MODULE(_mcts, m) {
  m.doc() = "The compiled search core: numbers only, never calls Python.";
  bind_forest(m);
  bind_reward(m);
}
