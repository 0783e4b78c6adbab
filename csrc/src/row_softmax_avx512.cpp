// AVX-512F.
#include <immintrin.h>

#include "row_softmax_kernels.hpp"

namespace tercet {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int kLanes = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static __mmask16 not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static F keep(__mmask16 mask, F x) { return _mm512_maskz_mov_ps(mask, x); }

  // p * 2^n, where the low bits of `shifted` hold n.
  static F scale_by_exponent(F p, F shifted) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), n));
  }

  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static F load(const BFloat16* x) {
    const __m512i bits = _mm512_cvtepu16_epi32(load16(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static F load(const Float16* x) { return _mm512_cvtph_ps(load16(x)); }

  static void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  static void store(BFloat16* out, F x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
    store16(out, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store(Float16* out, F x) {
    store16(out, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

 private:
  static __m256i load16(const void* x) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(x));
  }
  static void store16(void* out, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(out), x); }
};

}  // namespace

RowKernels avx512_row_kernels() { return {&forward<Avx512>, &backward<Avx512>}; }

}  // namespace tercet
