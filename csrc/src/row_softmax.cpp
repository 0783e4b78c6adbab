#include "tercet/row_softmax.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "row_softmax_entry.hpp"

#ifndef _OPENMP
#include <thread>
#endif

namespace tercet {
namespace {

constexpr std::int64_t kColumnsPerTask = 1 << 16;  // logits: tens of microseconds

void check(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument("row_softmax: " + what);
}

void check_layout(const RowLayout& layout, const char* name) {
  check(layout.inner >= 1,
        std::string(name) + ": inner must be >= 1, got " + std::to_string(layout.inner));
  check(layout.stride_outer >= 0 && layout.stride_inner >= 0,
        std::string(name) + ": strides must be >= 0");
}

void check_tile(const RowTile& tile) {
  check(tile.rows >= 0 && tile.columns >= 0 && tile.first_column >= 0 && tile.num_targets >= 0,
        "rows, columns, first_column and num_targets must be >= 0");
  check_layout(tile.layout, "x");
  if (tile.rows == 0) return;
  check(tile.columns == 0 || tile.x != nullptr, "x must not be null");
  check(tile.num_targets == 0 || tile.targets != nullptr, "targets must not be null");
  check(tile.scale != nullptr, "scale must not be null");
}

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
#endif

struct InstructionSet {
  std::string_view name;
  RowKernels kernels;
};

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> found{{"portable", portable_row_kernels()}};
#if defined(__x86_64__)
  if (has_avx2()) found.push_back({"avx2", avx2_row_kernels()});
  if (has_avx512()) found.push_back({"avx512", avx512_row_kernels()});
#endif
  return found;
}

const RowKernels& kernels_of(std::string_view name) {
  static const std::vector<InstructionSet> found = instruction_sets();
  if (name.empty()) return found.back().kernels;
  for (const InstructionSet& set : found) {
    if (set.name == name) return set.kernels;
  }
  throw std::invalid_argument(
      "row_softmax: instruction_set must be one that this machine has, got " + std::string(name));
}

// Calls work(begin, end) for parts of the rows that threads take in turn.
template <class Work>
void share_rows(const RowTile& tile, int num_threads, Work work) {
  const std::int64_t step = std::max<std::int64_t>(1, kColumnsPerTask / (tile.columns + 1));
  const std::int64_t tasks = (tile.rows + step - 1) / step;
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, tasks));
  std::atomic<std::int64_t> next{0};
  const auto take = [&] {
    for (std::int64_t task = next++; task < tasks; task = next++) {
      work(task * step, std::min(tile.rows, (task + 1) * step));
    }
  };
  if (threads <= 1) return take();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  take();
#else
  std::vector<std::jthread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take);
  take();
#endif
}

}  // namespace

std::vector<std::string_view> row_instruction_sets() {
  std::vector<std::string_view> names;
  for (const InstructionSet& set : instruction_sets()) names.push_back(set.name);
  return names;
}

void row_softmax_forward(const RowTile& tile, const RowState& state, const RowRun& run,
                         void* exponentials) {
  check_tile(tile);
  check(run.num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(run.num_threads));
  const RowKernels& kernels = kernels_of(run.instruction_set);
  if (tile.rows == 0) return;
  check(state.maximum != nullptr && state.rest != nullptr, "maximum and rest must not be null");
  check(tile.num_targets == 0 || state.picked != nullptr, "picked must not be null");
  share_rows(tile, run.num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.forward(tile, state, exponentials, begin, end);
  });
}

void row_softmax_backward(const RowTile& tile, const RowGrads& grads, void* dx,
                          const RowLayout& dx_layout, const RowRun& run) {
  check_tile(tile);
  check_layout(dx_layout, "dx");
  check(run.num_threads >= 1, "num_threads must be >= 1, got " + std::to_string(run.num_threads));
  const RowKernels& kernels = kernels_of(run.instruction_set);
  if (tile.rows == 0) return;
  check(grads.maximum != nullptr && grads.log_sum != nullptr && grads.a != nullptr,
        "maximum, log_sum and a must not be null");
  check(tile.num_targets == 0 || grads.target != nullptr, "target must not be null");
  check(tile.columns == 0 || dx != nullptr, "dx must not be null");
  share_rows(tile, run.num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernels.backward(tile, grads, dx, dx_layout, begin, end);
  });
}

}  // namespace tercet
