// The product with a packed matrix for AVX2, FMA and F16C. Eight values at a time are moved to their columns by tables
// of 256 permutations, of floats or of the bytes of 16-bit numbers.
#pragma once

#include "cpu/packed_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <array>
#include <type_traits>

namespace ace::cpu::avx2 {

// The number of bits set below bit c: the place of column c's value.
constexpr uint32_t place_of(unsigned bits, unsigned c) {
  uint32_t place = 0;
  for (unsigned before = 0; before < c; ++before) place += bits >> before & 1u;
  return place;
}

// Entry `bits` has at column c the place of its float, and the highest bit set if there is one.
constexpr std::array<std::array<uint32_t, 8>, 256> make_places() {
  std::array<std::array<uint32_t, 8>, 256> table{};
  for (unsigned bits = 0; bits < 256; ++bits)
    for (unsigned c = 0; c < 8; ++c) table[bits][c] = place_of(bits, c) | (bits >> c & 1u) << 31;
  return table;
}
alignas(64) inline constexpr auto kPlaces = make_places();

// Entry `bits` has at column c, which is `bytes` wide, the byte indices of its 16-bit value in the last two bytes if
// there is one; indices of 0x80 give 0.
template <size_t bytes>
constexpr std::array<std::array<uint8_t, 8 * bytes>, 256> make_value_bytes() {
  std::array<std::array<uint8_t, 8 * bytes>, 256> table{};
  for (unsigned bits = 0; bits < 256; ++bits) {
    for (auto& byte : table[bits]) byte = 0x80;
    for (unsigned c = 0; c < 8; ++c) {
      if (!(bits >> c & 1u)) continue;
      const uint32_t place = place_of(bits, c);
      table[bits][bytes * (c + 1) - 2] = static_cast<uint8_t>(2 * place);
      table[bits][bytes * (c + 1) - 1] = static_cast<uint8_t>(2 * place + 1);
    }
  }
  return table;
}
alignas(64) inline constexpr auto kHalfBytes = make_value_bytes<2>();
alignas(64) inline constexpr auto kFloatBytes = make_value_bytes<4>();  // a bfloat16 is the upper half of a float

}  // namespace ace::cpu::avx2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
namespace ace::cpu::avx2 {

template <class Value>
struct Avx2 {
  using T = Value;
  using X = float;
  static constexpr int kWidth = 8;
  // With 4 tokens, 12 sums, 3 rows' weights and an input fill the registers.
  static constexpr int far_rows(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 3; }
  using Weights = __m256;
  using Sums = __m256;

  static ACE_HD Sums zero() { return _mm256_setzero_ps(); }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
      const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFloatBytes[bits].data()));
      return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, bytes));
    } else if constexpr (std::is_same_v<T, Half>) {
      const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(kHalfBytes[bits].data()));
      return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), bytes));
    } else {
      const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces[bits].data()));
      const __m256 stored = _mm256_castsi256_ps(_mm256_srai_epi32(places, 31));
      return _mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(values), places), stored);
    }
  }
  static ACE_HD Sums add(Sums sums, Weights weights, const float* x) {
    return _mm256_fmadd_ps(weights, _mm256_loadu_ps(x), sums);
  }
  static ACE_HD void store(T* out, Weights weights) {
    if constexpr (std::is_same_v<T, float>) {
      _mm256_storeu_ps(out, weights);
    } else {
      const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(weights), 16);
      const __m128i halves = std::is_same_v<T, Half>
                                 ? _mm256_cvtps_ph(weights, _MM_FROUND_TO_NEAREST_INT)
                                 : _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
    }
  }
  static ACE_HD float total(Sums sums) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

#include "cpu/packed_loop.inc"

}  // namespace ace::cpu::avx2
#pragma GCC pop_options
#endif
