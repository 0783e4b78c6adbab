// Row statistics and gradients of a softmax over a vocabulary that arrives in column tiles.
//
// With e_j = exp((x_j - max x) * scale) a row is described by (maximum, rest, spread):
//   rest   = the sum of e_j over all tokens but the first likeliest one
//   spread = the sum of e_j * (max x - x_j) * scale over all tokens
// Leaving the likeliest token out keeps log1p(rest) = -log p_max precise when p_max -> 1.  Source
// of the running maximum: arXiv:1805.02867, alg. 3.  kernels/_row_softmax.py says what else is
// made of them, and is the definition that this code is tested against.
//
// A logit of -inf has probability 0; NaN or +inf makes the row NaN.  Sums are carried in double
// within a tile.  exp is within 2 units in the last place and 0 below the smallest normal float.
// Rows do not depend on each other, nor results on the number of threads.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace tercet {

enum class RowType : std::uint8_t { kFloat32, kBFloat16, kFloat16 };

// Element j of row r lies at (r / inner) * stride_outer + (r % inner) * stride_inner + j.
struct RowLayout {
  std::int64_t inner{1};         // rows per outer step, >= 1
  std::int64_t stride_outer{0};  // in elements
  std::int64_t stride_inner{0};
};

// Columns [first_column, first_column + columns) of the logits, and the tokens asked for.
struct RowTile {
  const void* x{nullptr};
  RowType type{RowType::kFloat32};
  RowLayout layout;
  std::int64_t rows{0};
  std::int64_t columns{0};
  std::int64_t first_column{0};
  const std::int64_t* targets{nullptr};  // [rows, num_targets]; those outside the tile are skipped
  std::int64_t num_targets{1};
  const float* scale{nullptr};  // [rows], 1 / temperature
};

// What is known of the rows after some tiles, read and written.
struct RowState {
  float* maximum{nullptr};  // [rows], of x; -infinity at the start
  float* rest{nullptr};     // [rows], 0 at the start
  float* spread{nullptr};   // [rows], 0 at the start; null: no entropy is wanted
  float* picked{nullptr};   // [rows, num_targets], logits of the targets that the tile holds
};

// dx_j = -p_j (a + b log p_j), except at the targets, where it is `target`.  A row with a = b = 0
// gets zeros and is not read.
struct RowGrads {
  const float* maximum{nullptr};  // [rows]
  const float* log_sum{nullptr};  // [rows], log1p(rest)
  const float* a{nullptr};        // [rows]
  const float* b{nullptr};        // [rows]; null: no gradient of the entropy
  const float* target{nullptr};   // [rows, num_targets]
};

struct RowRun {
  int num_threads{1};                // at most
  std::string_view instruction_set;  // one of row_instruction_sets(); empty: the last of them
};

// Those of this machine, slowest first: "portable", "avx2" (with FMA and F16C), "avx512" (F alone).
[[nodiscard]] std::vector<std::string_view> row_instruction_sets();

// Adds a tile to the state.  `exponentials`, where it is not null, gets exp((x - maximum) * scale)
// with the maximum of all tiles so far, in the tile's type and layout; it may be x itself.
// Throws std::invalid_argument for a null pointer, a negative size or an unknown instruction set.
void row_softmax_forward(const RowTile& tile, const RowState& state, const RowRun& run,
                         void* exponentials = nullptr);

// Writes the gradient of the tile's logits to dx, whose type is the tile's; dx may be x itself if
// both layouts are equal.  Throws as the forward does.
void row_softmax_backward(const RowTile& tile, const RowGrads& grads, void* dx,
                          const RowLayout& dx_layout, const RowRun& run);

}  // namespace tercet
