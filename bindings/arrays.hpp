// Checked NumPy arguments of the bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>

// The elements of a contiguous array of exactly this dtype and of any shape; nothing is copied.
// Throws TypeError or ValueError that begins with `op` and names the argument.
template <typename T>
std::span<const T> elements(const pybind11::array& array, const char* op, const char* name) {
  namespace py = pybind11;
  const auto must = [&] { return std::string(op) + ": " + name + " must be "; };
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(must() + std::string(py::str(py::dtype::of<T>())) + ", got " +
                         std::string(py::str(array.dtype())));
  }
  if ((array.flags() & py::array::c_style) == 0) {
    throw py::value_error(must() + "contiguous, got strides " +
                          std::string(py::str(array.attr("strides"))) +
                          "; call numpy.ascontiguousarray");
  }
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
    throw py::value_error(must() + "aligned in memory; copy it");
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

// The elements of a one-dimensional contiguous array of exactly this dtype; nothing is copied.
// Throws TypeError or ValueError that begins with `op` and names the argument.
template <typename T>
std::span<const T> row(const pybind11::array& array, const char* op, const char* name) {
  if (array.ndim() != 1) {
    throw pybind11::value_error(std::string(op) + ": " + name +
                                " must be one-dimensional, got shape " +
                                std::string(pybind11::str(array.attr("shape"))));
  }
  return elements<T>(array, op, name);
}
