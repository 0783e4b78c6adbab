// Row kernels by address: whoever calls owns the memory and has checked it, see
// kernels/_row_softmax_cpu.py.  A module of its own, imported after torch, so that the two share
// one OpenMP runtime and its threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "tercet/row_softmax.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;
using Layout = std::array<std::int64_t, 3>;  // inner, stride_outer, stride_inner

template <typename T>
T* at(std::optional<Address> address) {
  return reinterpret_cast<T*>(address.value_or(0));
}

tercet::RowLayout layout_of(const Layout& layout) { return {layout[0], layout[1], layout[2]}; }

tercet::RowTile tile_of(Address x, tercet::RowType type, const Layout& layout, std::int64_t rows,
                        std::int64_t columns, std::int64_t first_column, Address targets,
                        std::int64_t num_targets, Address scale) {
  return {at<const void>(x),
          type,
          layout_of(layout),
          rows,
          columns,
          first_column,
          at<const std::int64_t>(targets),
          num_targets,
          at<const float>(scale)};
}

void forward(Address x, tercet::RowType type, const Layout& layout, std::int64_t rows,
             std::int64_t columns, std::int64_t first_column, Address targets,
             std::int64_t num_targets, Address scale, Address maximum, Address rest,
             std::optional<Address> spread, Address picked, std::optional<Address> exponentials,
             int num_threads, const std::string& instruction_set) {
  const tercet::RowTile tile =
      tile_of(x, type, layout, rows, columns, first_column, targets, num_targets, scale);
  const tercet::RowState state{at<float>(maximum), at<float>(rest), at<float>(spread),
                               at<float>(picked)};
  tercet::row_softmax_forward(tile, state, {num_threads, instruction_set}, at<void>(exponentials));
}

void backward(Address x, tercet::RowType type, const Layout& layout, std::int64_t rows,
              std::int64_t columns, std::int64_t first_column, Address targets,
              std::int64_t num_targets, Address scale, Address maximum, Address log_sum, Address a,
              std::optional<Address> b, Address target, Address dx, const Layout& dx_layout,
              int num_threads, const std::string& instruction_set) {
  const tercet::RowTile tile =
      tile_of(x, type, layout, rows, columns, first_column, targets, num_targets, scale);
  const tercet::RowGrads grads{at<const float>(maximum), at<const float>(log_sum),
                               at<const float>(a), at<const float>(b), at<const float>(target)};
  tercet::row_softmax_backward(tile, grads, at<void>(dx), layout_of(dx_layout),
                               {num_threads, instruction_set});
}

}  // namespace

PYBIND11_MODULE(_rows, m) {
  m.doc() = "Compiled row kernels of a softmax over a vocabulary; addresses in, nothing checked.";
  py::enum_<tercet::RowType>(m, "RowType", "Element type of logits.")
      .value("float32", tercet::RowType::kFloat32)
      .value("bfloat16", tercet::RowType::kBFloat16)
      .value("float16", tercet::RowType::kFloat16);
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const std::string_view name : tercet::row_instruction_sets()) names.emplace_back(name);
        return names;
      },
      "Instruction sets of this machine, slowest first.");
  m.def("forward", &forward, py::kw_only(), "x"_a, "type"_a, "layout"_a, "rows"_a, "columns"_a,
        "first_column"_a, "targets"_a, "num_targets"_a, "scale"_a, "maximum"_a, "rest"_a,
        "spread"_a, "picked"_a, "exponentials"_a = py::none(), "num_threads"_a, "instruction_set"_a,
        py::call_guard<py::gil_scoped_release>(), "tercet::row_softmax_forward.");
  m.def("backward", &backward, py::kw_only(), "x"_a, "type"_a, "layout"_a, "rows"_a, "columns"_a,
        "first_column"_a, "targets"_a, "num_targets"_a, "scale"_a, "maximum"_a, "log_sum"_a, "a"_a,
        "b"_a, "target"_a, "dx"_a, "dx_layout"_a, "num_threads"_a, "instruction_set"_a,
        py::call_guard<py::gil_scoped_release>(), "tercet::row_softmax_backward.");
}
