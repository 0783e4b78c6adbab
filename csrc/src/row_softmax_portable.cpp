// Any machine with vectors of four floats, or without: the compiler's vector extension.
#include "row_softmax_kernels.hpp"

namespace tercet {
namespace {

float from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) {  // inf, NaN
    return __builtin_bit_cast(float, sign | 0x7f800000U | (magnitude << 13));
  }
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112F;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(std::uint32_t, scaled));
}

// To nearest, ties to even.
std::uint16_t to_half(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    magnitude = 0x7e00U;
  } else if (magnitude >= 0x47800000U) {  // 2^16
    magnitude = 0x7c00U;
  } else if (magnitude < 0x38800000U) {  // below 2^-14: adding 0.5 rounds at 2^-24
    const float rounded = __builtin_bit_cast(float, magnitude) + 0.5F;
    magnitude = __builtin_bit_cast(std::uint32_t, rounded) - 0x3f000000U;
  } else {
    magnitude = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - 0x38000000U) >> 13;
  }
  return static_cast<std::uint16_t>(sign | magnitude);
}

std::uint16_t to_bfloat16(float x) {
  const auto bits = __builtin_bit_cast(std::uint32_t, x);
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  const std::uint32_t rounded = nan ? bits | 0x400000U : bits + 0x7fffU + ((bits >> 16) & 1U);
  return static_cast<std::uint16_t>(rounded >> 16);
}

struct Portable {
  static constexpr int kLanes = 4;
  using F = float __attribute__((vector_size(16)));
  using I = std::int32_t __attribute__((vector_size(16)));

  static F set(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }  // one rounding where the machine has it
  static F max(F a, F b) { return a > b ? a : b; }   // b where one is NaN
  static bool any_greater(F a, F b) {
    const I greater = a > b;
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
  }
  static I not_less(F a, F b) { return ~(a < b); }
  static F keep(I mask, F x) { return __builtin_bit_cast(F, mask & __builtin_bit_cast(I, x)); }

  // p * 2^n, where the low bits of `shifted` hold n.
  static F scale_by_exponent(F p, F shifted) {
    using U = std::uint32_t __attribute__((vector_size(16)));
    const U n = __builtin_bit_cast(U, shifted) << 23;
    return __builtin_bit_cast(F, __builtin_bit_cast(U, p) + n);
  }

  static F load(const float* x) { return F{x[0], x[1], x[2], x[3]}; }
  static F load(const BFloat16* x) {
    F out{};
    for (int i = 0; i < kLanes; ++i) {
      out[i] = __builtin_bit_cast(float, static_cast<std::uint32_t>(x[i].bits) << 16);
    }
    return out;
  }
  static F load(const Float16* x) {
    return F{from_half(x[0].bits), from_half(x[1].bits), from_half(x[2].bits),
             from_half(x[3].bits)};
  }

  static void store(float* out, F x) { __builtin_memcpy(out, &x, sizeof(x)); }
  static void store(BFloat16* out, F x) {
    for (int i = 0; i < kLanes; ++i) out[i].bits = to_bfloat16(x[i]);
  }
  static void store(Float16* out, F x) {
    for (int i = 0; i < kLanes; ++i) out[i].bits = to_half(x[i]);
  }
};

}  // namespace

RowKernels portable_row_kernels() { return {&forward<Portable>, &backward<Portable>}; }

}  // namespace tercet
