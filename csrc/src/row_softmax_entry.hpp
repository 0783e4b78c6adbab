// What each instruction set's source offers to row_softmax.cpp.
#pragma once

#include <cstdint>

#include "tercet/row_softmax.hpp"

namespace tercet {

// Rows [begin, end) of a checked tile.
struct RowKernels {
  void (*forward)(const RowTile&, const RowState&, void* exponentials, std::int64_t begin,
                  std::int64_t end);
  void (*backward)(const RowTile&, const RowGrads&, void* dx, const RowLayout& dx_layout,
                   std::int64_t begin, std::int64_t end);
};

RowKernels portable_row_kernels();
RowKernels avx2_row_kernels();  // x86-64 alone, as the next
RowKernels avx512_row_kernels();

}  // namespace tercet
