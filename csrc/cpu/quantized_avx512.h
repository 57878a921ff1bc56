// The product with a packed matrix of quantized survivors for AVX-512, with inputs in float32: codes become float, and
// sixteen at a time are expanded by a mask. quantized_vnni.h is the faster one for shorter types.
#pragma once

#include "cpu/packed_avx512.h"
#include "cpu/quantized_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <array>

namespace ace::cpu::avx512 {

// bfloat16 bits of the 16 codes of 4 bits, twice, because the index of a permutation of words has 5 bits. Two's
// complement: code 8 is -8.
constexpr std::array<uint16_t, 32> make_half_codes() {
  constexpr std::array<uint16_t, 9> size = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100};
  std::array<uint16_t, 32> table{};
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned code = i % 16;
    table[i] = code < 8 ? size[code] : static_cast<uint16_t>(0x8000u | size[16 - code]);
  }
  return table;
}
alignas(64) inline constexpr auto kHalfCodes = make_half_codes();

}  // namespace ace::cpu::avx512

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
namespace ace::cpu::avx512 {

// The 32 codes of 4 bits of 16 bytes, as bfloat16. Each byte stands twice in 32 bits, the second time shifted by 4
// below the upper 16; the bits above an index have no effect.
ACE_HD __m512i half_codes(const uint8_t* codes) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i halves = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
  return _mm512_permutexvar_epi16(halves, _mm512_load_si512(kHalfCodes.data()));
}

// 16 codes of 8 bits.
ACE_HD __m512 byte_codes(const uint8_t* codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

struct Quantized : Avx512<float> {
  static constexpr float kUnit = 1.0f;
  static constexpr int kDecoded = 32;

  template <int kBits>
  static ACE_HD void decode(const uint8_t* codes, float* out) {
    if constexpr (kBits == 8) {
      _mm512_storeu_ps(out, byte_codes(codes));
      _mm512_storeu_ps(out + 16, byte_codes(codes + 16));
    } else {
      const __m512i halves = half_codes(codes);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
      _mm512_storeu_si512(out, _mm512_slli_epi32(low, 16));
      _mm512_storeu_si512(out + 16, _mm512_slli_epi32(high, 16));
    }
  }
  static ACE_HD Sums plus(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static ACE_HD Sums add_scaled(Sums sums, float scale, Sums part) {
    return _mm512_fmadd_ps(_mm512_set1_ps(scale), part, sums);
  }
  static ACE_HD void store_scaled(float* out, float scale, Weights weights) {
    _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_set1_ps(scale), weights, _mm512_setzero_ps()));
  }
};

#include "cpu/quantized_loop.inc"

}  // namespace ace::cpu::avx512
#pragma GCC pop_options
#endif
