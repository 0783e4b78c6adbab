// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "row_softmax_kernels.hpp"

namespace tercet {
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kLanes = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where one is NaN
  static bool any_greater(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static F not_less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static F keep(F mask, F x) { return _mm256_and_ps(mask, x); }

  // p * 2^n, where the low bits of `shifted` hold n.
  static F scale_by_exponent(F p, F shifted) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), n));
  }

  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static F load(const BFloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(load16(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  }
  static F load(const Float16* x) { return _mm256_cvtph_ps(load16(x)); }

  static void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  static void store(BFloat16* out, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    store16(out, _mm256_castsi256_si128(packed));
  }
  static void store(Float16* out, F x) {
    store16(out, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

 private:
  static __m128i load16(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static void store16(void* out, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(out), x); }
};

}  // namespace

RowKernels avx2_row_kernels() { return {&forward<Avx2>, &backward<Avx2>}; }

}  // namespace tercet
