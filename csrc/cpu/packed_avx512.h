// The product with a packed matrix for AVX-512. Sixteen values are widened to float and expanded by a mask; with VBMI2
// and bf16, 32 bfloat16 values are expanded directly and multiplied in pairs.
#pragma once

#include "cpu/packed_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
namespace ace::cpu::avx512 {

// AMD's Zen 5 expands from memory three times slower than from a register, and the expansion depends on the old content
// of the result register even with zeroing. So values are loaded first, and the result is a fresh zero. These two
// functions keep the compiler from merging the instructions.
ACE_HD __m512i in_register(const void* values) {
  __m512i wide = _mm512_loadu_si512(values);
  __asm__("" : "+v"(wide));
  return wide;
}
ACE_HD __m512i new_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

template <class Value>
struct Avx512 {
  using T = Value;
  using X = float;
  static constexpr int kWidth = 16;
  static constexpr int far_rows(int) { return 1; }
  using Weights = __m512;
  using Sums = __m512;

  static ACE_HD Sums zero() { return _mm512_setzero_ps(); }
  static ACE_HD __m512 widen(const T* values) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_castsi512_ps(in_register(values));
    } else {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      if constexpr (std::is_same_v<T, Half>) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(new_zero()), static_cast<__mmask16>(bits), widen(values));
  }
  static ACE_HD Sums add(Sums sums, Weights weights, const float* x) {
    return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sums);
  }
  static ACE_HD void store(T* out, Weights weights) {
    if constexpr (std::is_same_v<T, float>) {
      _mm512_storeu_ps(out, weights);
    } else {
      const __m256i halves = std::is_same_v<T, Half>
                                 ? _mm512_cvtps_ph(weights, _MM_FROUND_TO_NEAREST_INT)
                                 : _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(weights), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
    }
  }
  static ACE_HD float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};

#include "cpu/packed_loop.inc"

}  // namespace ace::cpu::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")
namespace ace::cpu::avx512bf16 {

// Subnormal inputs and sums count as 0 in this instruction.
struct Avx512Bf16 {
  using T = BFloat16;
  using X = BFloat16;
  static constexpr int kWidth = 32;
  static constexpr int far_rows(int) { return 1; }
  using Weights = __m512i;
  using Sums = __m512;

  static ACE_HD Sums zero() { return _mm512_setzero_ps(); }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    return _mm512_mask_expand_epi16(avx512::new_zero(), static_cast<__mmask32>(bits), avx512::in_register(values));
  }
  static ACE_HD Sums add(Sums sums, Weights weights, const X* x) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
  }
  static ACE_HD void store(T* out, Weights weights) { _mm512_storeu_si512(out, weights); }
  static ACE_HD float total(Sums sums) { return _mm512_reduce_add_ps(sums); }
};

#include "cpu/packed_loop.inc"

}  // namespace ace::cpu::avx512bf16
#pragma GCC pop_options
#endif
