// The row loops, once for every instruction set; only the row_softmax_*.cpp of one include this.
//
// A source compiled for one instruction set must not emit a function that another source might
// emit, too: the linker keeps one of the two, and an older machine would meet foreign instructions.
// So everything here has internal linkage, and no inline function of the standard library is used.
//
// S is an instruction set: a vector F of kLanes floats and the operations on it.
#pragma once

#include <cstdint>

#include "row_softmax_entry.hpp"
#include "tercet/row_softmax.hpp"

namespace tercet {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2High = 0.693359375F;  // 9 bits, so that n * kLn2High is exact
constexpr float kLn2Low = -2.12194440e-4F;
constexpr float kRound = 12582912.0F;            // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLowest = -87.33654F;            // exp of less is below the smallest normal float
constexpr int kUnroll = 4;                       // vectors per chunk
constexpr std::int64_t kFlushColumns = 4096;     // until the float sums move into doubles
constexpr std::uintptr_t kPrefetchBytes = 2048;  // ahead; the hardware's stops at each 4 KB page

template <class S>
struct Exp {
  typename S::F value;  // exp(d)
  typename S::F d;      // 0 where value is 0, so that their product is
};

// exp(d) for d <= 0, 0 for d < kLowest, NaN for NaN.  exp(r) on [-ln2/2, ln2/2] is
// 1 + r + r^2 q(r) with q minimax in the relative error, 2^-27.9.
template <class S>
inline Exp<S> exp_of(typename S::F d) {
  using F = typename S::F;
  const F shifted = S::fma(d, S::set(kLog2E), S::set(kRound));
  const F n = S::sub(shifted, S::set(kRound));
  const F r = S::fma(n, S::set(-kLn2Low), S::fma(n, S::set(-kLn2High), d));
  F q = S::fma(r, S::set(0x1.6a2434p-10F), S::set(0x1.1239e2p-7F));
  q = S::fma(q, r, S::set(0x1.5558f2p-5F));
  q = S::fma(q, r, S::set(0x1.555492p-3F));
  q = S::fma(q, r, S::set(0x1.fffffcp-2F));
  const F p = S::fma(S::mul(r, r), q, S::add(r, S::set(1.0F)));
  const auto normal = S::not_less(d, S::set(kLowest));  // true for NaN
  return {S::keep(normal, S::scale_by_exponent(p, shifted)), S::keep(normal, d)};
}

template <class S, class T>
inline float widen(T value) {
  T copies[S::kLanes];
  for (T& copy : copies) copy = value;
  float lanes[S::kLanes];
  S::store(lanes, S::load(copies));
  return lanes[0];
}

template <class S, class T>
inline T narrow(float value) {
  T copies[S::kLanes];
  S::store(copies, S::set(value));
  return copies[0];
}

// The last count < kLanes * vectors elements of a row, behind them -inf, which adds nothing.
template <class S, class T, int kSize>
inline void pad(T (&out)[kSize], const T* x, std::int64_t count) {
  const T nothing = narrow<S, T>(-kInfinity);
  for (T& value : out) value = nothing;
  __builtin_memcpy(out, x, static_cast<std::size_t>(count) * sizeof(T));
}

inline void prefetch(const void* x) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(x) + kPrefetchBytes));
}

struct Row {
  float maximum;
  float scale;
  double rest;
  double spread;
};

// The part of `rest` and `spread` that is still spread over float lanes.
template <class S>
struct Sums {
  typename S::F e[kUnroll];
  typename S::F ed[kUnroll];
};

template <class S>
inline Sums<S> zero_sums() {
  Sums<S> sums;
  for (int u = 0; u < kUnroll; ++u) sums.e[u] = sums.ed[u] = S::set(0.0F);
  return sums;
}

template <class S>
inline double total(const typename S::F (&parts)[kUnroll]) {
  float lanes[S::kLanes];
  S::store(lanes, S::add(S::add(parts[0], parts[1]), S::add(parts[2], parts[3])));
  double sum = 0.0;
  for (const float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

template <class S, bool kEntropy>
inline void flush(Row& row, const Sums<S>& sums) {
  row.rest += total<S>(sums.e);
  if constexpr (kEntropy) row.spread -= total<S>(sums.ed);
}

template <class S, bool kEntropy>
inline void accumulate(Sums<S>& sums, const typename S::F (&x)[kUnroll], const Row& row) {
  const auto base = S::set(row.maximum == -kInfinity ? 0.0F : row.maximum);
  for (int u = 0; u < kUnroll; ++u) {
    const Exp<S> e = exp_of<S>(S::mul(S::sub(x[u], base), S::set(row.scale)));
    sums.e[u] = S::add(sums.e[u], e.value);
    if constexpr (kEntropy) sums.ed[u] = S::fma(e.value, e.d, sums.ed[u]);
  }
}

// Moves the sums to a higher maximum; the old one counts among the rest from now on.
inline void raise_maximum(Row& row, float maximum) {
  if (row.maximum != -kInfinity) {
    const double fall = (static_cast<double>(maximum) - static_cast<double>(row.maximum)) *
                        static_cast<double>(row.scale);
    const double shrink = __builtin_exp(-fall);
    const double all = 1.0 + row.rest;
    if (shrink > 0.0) row.spread += all * fall;  // else fall may be infinite
    row.spread *= shrink;
    row.rest = all * shrink;
  }
  if (maximum == kInfinity) row.rest = __builtin_nan("");
  row.maximum = maximum;
}

// Adds a chunk that holds a new maximum, which stays out of the sums.
template <class S, bool kEntropy>
[[gnu::noinline]] Row add_growing(Row row, const float* chunk) {
  constexpr int kChunk = kUnroll * S::kLanes;
  float others[kChunk];
  int best = 0;
  for (int i = 0; i < kChunk; ++i) {
    others[i] = chunk[i];
    if (chunk[i] > chunk[best] || chunk[best] != chunk[best]) best = i;
  }
  raise_maximum(row, chunk[best]);
  others[best] = -kInfinity;
  typename S::F x[kUnroll];
  for (int u = 0; u < kUnroll; ++u) x[u] = S::load(others + u * S::kLanes);
  Sums<S> sums = zero_sums<S>();
  accumulate<S, kEntropy>(sums, x, row);
  flush<S, kEntropy>(row, sums);
  return row;
}

template <class S, class T, bool kEntropy>
inline void add_chunk(Row& row, Sums<S>& sums, const T* chunk) {
  typename S::F x[kUnroll];
  for (int u = 0; u < kUnroll; ++u) x[u] = S::load(chunk + u * S::kLanes);
  const auto top = S::max(S::max(x[0], x[1]), S::max(x[2], x[3]));
  if (S::any_greater(top, S::set(row.maximum))) [[unlikely]] {
    flush<S, kEntropy>(row, sums);
    sums = zero_sums<S>();
    float values[kUnroll * S::kLanes];
    for (int u = 0; u < kUnroll; ++u) S::store(values + u * S::kLanes, x[u]);
    row = add_growing<S, kEntropy>(row, values);
  } else {
    accumulate<S, kEntropy>(sums, x, row);
  }
}

template <class S, class T, bool kEntropy>
inline void add_columns(Row& row, const T* x, std::int64_t columns) {
  constexpr std::int64_t kChunk = kUnroll * S::kLanes;
  const std::int64_t whole = columns - columns % kChunk;
  for (std::int64_t start = 0; start < whole; start += kFlushColumns) {
    const std::int64_t stop = whole - start < kFlushColumns ? whole : start + kFlushColumns;
    Sums<S> sums = zero_sums<S>();
    for (std::int64_t j = start; j < stop; j += kChunk) {
      for (int u = 0; u < kUnroll; ++u) prefetch(x + j + u * S::kLanes);
      add_chunk<S, T, kEntropy>(row, sums, x + j);
    }
    flush<S, kEntropy>(row, sums);
  }
  if (whole == columns) return;
  T padded[kChunk];
  pad<S>(padded, x + whole, columns - whole);
  Sums<S> sums = zero_sums<S>();
  add_chunk<S, T, kEntropy>(row, sums, padded);
  flush<S, kEntropy>(row, sums);
}

struct Gradient {
  float maximum;
  float scale;
  float log_sum;
  float a;
  float b;
};

template <class S, bool kEntropy>
inline typename S::F gradient_of(typename S::F x, const Gradient& g) {
  const auto d = S::mul(S::sub(x, S::set(g.maximum)), S::set(g.scale));
  const Exp<S> p = exp_of<S>(S::sub(d, S::set(g.log_sum)));
  if constexpr (!kEntropy) return S::mul(p.value, S::set(-g.a));
  return S::mul(p.value, S::fma(p.d, S::set(-g.b), S::set(-g.a)));
}

template <class S, class T, bool kEntropy>
inline void write_columns(T* dx, const T* x, std::int64_t columns, const Gradient& g) {
  const std::int64_t whole = columns - columns % S::kLanes;
#pragma GCC unroll 4
  for (std::int64_t j = 0; j < whole; j += S::kLanes) {
    prefetch(x + j);
    S::store(dx + j, gradient_of<S, kEntropy>(S::load(x + j), g));
  }
  if (whole == columns) return;
  T padded[S::kLanes];
  pad<S>(padded, x + whole, columns - whole);
  S::store(padded, gradient_of<S, kEntropy>(S::load(padded), g));
  __builtin_memcpy(dx + whole, padded, static_cast<std::size_t>(columns - whole) * sizeof(T));
}

inline std::int64_t offset(const RowLayout& layout, std::int64_t row) {
  return (row / layout.inner) * layout.stride_outer + (row % layout.inner) * layout.stride_inner;
}

// Calls visit(index of the target among all, its column in the tile) for the row's targets inside.
template <class Visit>
inline void each_target(const RowTile& tile, std::int64_t row, Visit visit) {
  for (std::int64_t i = row * tile.num_targets; i < (row + 1) * tile.num_targets; ++i) {
    const std::int64_t target = tile.targets[i];
    if (target < tile.first_column || target - tile.first_column >= tile.columns) continue;
    visit(i, target - tile.first_column);
  }
}

// exp((x - maximum) * scale); 0 throughout where every logit is -inf.
template <class S, class T>
inline void write_exponentials(T* out, const T* x, std::int64_t columns, const Row& row) {
  const float base = row.maximum == -kInfinity ? 0.0F : row.maximum;
  write_columns<S, T, false>(out, x, columns, {base, row.scale, 0.0F, -1.0F, 0.0F});
}

template <class S, class T, bool kEntropy>
void forward_rows(const RowTile& tile, const RowState& state, void* exponentials,
                  std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(tile.x) + offset(tile.layout, r);
    Row row{state.maximum[r], tile.scale[r], static_cast<double>(state.rest[r]), 0.0};
    if constexpr (kEntropy) row.spread = static_cast<double>(state.spread[r]);
    add_columns<S, T, kEntropy>(row, x, tile.columns);
    state.maximum[r] = row.maximum;
    state.rest[r] = static_cast<float>(row.rest);
    if constexpr (kEntropy) state.spread[r] = static_cast<float>(row.spread);
    each_target(tile, r, [&](std::int64_t i, std::int64_t column) {
      state.picked[i] = widen<S>(x[column]);
    });
    if (exponentials == nullptr) continue;
    T* out = static_cast<T*>(exponentials) + offset(tile.layout, r);
    write_exponentials<S, T>(out, x, tile.columns, row);
  }
}

template <class S, class T, bool kEntropy>
void backward_rows(const RowTile& tile, const RowGrads& grads, void* out,
                   const RowLayout& out_layout, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(tile.x) + offset(tile.layout, r);
    T* dx = static_cast<T*>(out) + offset(out_layout, r);
    Gradient g{grads.maximum[r], tile.scale[r], grads.log_sum[r], grads.a[r], 0.0F};
    if constexpr (kEntropy) g.b = grads.b[r];
    if (g.a == 0.0F && g.b == 0.0F) {
      __builtin_memset(dx, 0, static_cast<std::size_t>(tile.columns) * sizeof(T));
    } else {
      write_columns<S, T, kEntropy>(dx, x, tile.columns, g);
    }
    each_target(tile, r, [&](std::int64_t i, std::int64_t column) {
      dx[column] = narrow<S, T>(grads.target[i]);
    });
  }
}

template <class S, class T>
void forward_of(const RowTile& tile, const RowState& state, void* exponentials, std::int64_t begin,
                std::int64_t end) {
  const auto rows =
      state.spread != nullptr ? &forward_rows<S, T, true> : &forward_rows<S, T, false>;
  rows(tile, state, exponentials, begin, end);
}

template <class S>
void forward(const RowTile& tile, const RowState& state, void* exponentials, std::int64_t begin,
             std::int64_t end) {
  switch (tile.type) {
    case RowType::kFloat32:
      return forward_of<S, float>(tile, state, exponentials, begin, end);
    case RowType::kBFloat16:
      return forward_of<S, BFloat16>(tile, state, exponentials, begin, end);
    case RowType::kFloat16:
      return forward_of<S, Float16>(tile, state, exponentials, begin, end);
  }
}

template <class S, class T>
void backward_of(const RowTile& tile, const RowGrads& grads, void* dx, const RowLayout& dx_layout,
                 std::int64_t begin, std::int64_t end) {
  const auto rows = grads.b != nullptr ? &backward_rows<S, T, true> : &backward_rows<S, T, false>;
  rows(tile, grads, dx, dx_layout, begin, end);
}

template <class S>
void backward(const RowTile& tile, const RowGrads& grads, void* dx, const RowLayout& dx_layout,
              std::int64_t begin, std::int64_t end) {
  switch (tile.type) {
    case RowType::kFloat32:
      return backward_of<S, float>(tile, grads, dx, dx_layout, begin, end);
    case RowType::kBFloat16:
      return backward_of<S, BFloat16>(tile, grads, dx, dx_layout, begin, end);
    case RowType::kFloat16:
      return backward_of<S, Float16>(tile, grads, dx, dx_layout, begin, end);
  }
}

}  // namespace
}  // namespace tercet
