// The product with a packed matrix of quantized survivors for AVX2 and FMA, of float32 tokens (quantized_madd.h has
// that of 16-bit ones), and unpacking. A table of 256 byte shuffles moves eight codes to the highest bytes of the
// integers of their columns, so that they need no sign extension.
//
// What was measured (AMD Zen 4, rows in the second-level cache): 16 to 17 cycles for 64 columns of a row; as many with
// `pdep` in place of the table (which AMD's Zen 1 and 2 execute in a loop), with several rows at a time, and with table
// places computed in advance.
#pragma once

#include "cpu/packed_avx2.h"
#include "cpu/quantized_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)

namespace ace::cpu::avx2 {

// Entry `bits` has at column c the byte index of its code in the last of four bytes if there is one, else 0x80: 0.
constexpr std::array<std::array<uint8_t, 32>, 256> make_code_bytes() {
  std::array<std::array<uint8_t, 32>, 256> table{};
  for (unsigned bits = 0; bits < 256; ++bits) {
    for (auto& byte : table[bits]) byte = 0x80;
    for (unsigned c = 0; c < 8; ++c)
      if (bits >> c & 1u) table[bits][4 * c + 3] = static_cast<uint8_t>(place_of(bits, c));
  }
  return table;
}
alignas(64) inline constexpr auto kCodeBytes = make_code_bytes();

}  // namespace ace::cpu::avx2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
namespace ace::cpu::avx2 {

struct Quantized : Avx2<float> {
  using T = int8_t;
  static constexpr float kUnit = 16777216.0f;
  static constexpr int kDecoded = 32;

  template <int kBits>
  static ACE_HD void decode(const uint8_t* codes, T* out) {
    auto* target = reinterpret_cast<__m256i*>(out);
    if constexpr (kBits == 8) {
      _mm256_storeu_si256(target, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    } else {
      const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
      const __m256i halves =
          _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
      const __m128i signed_codes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      _mm256_storeu_si256(target, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(signed_codes), halves));
    }
  }
  static ACE_HD Weights expand(const T* values, uint64_t bits) {
    int64_t eight;
    std::memcpy(&eight, values, sizeof eight);
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kCodeBytes[bits].data()));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), bytes));
  }
  static ACE_HD Sums plus(Sums a, Sums b) { return _mm256_add_ps(a, b); }
  static ACE_HD Sums add_scaled(Sums sums, float scale, Sums part) {
    return _mm256_fmadd_ps(_mm256_set1_ps(scale), part, sums);
  }
  static ACE_HD void store_scaled(float* out, float scale, Weights weights) {
    const __m256 codes = _mm256_mul_ps(_mm256_set1_ps(1.0f / kUnit), weights);
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_set1_ps(scale), codes, _mm256_setzero_ps()));
  }
};

#include "cpu/quantized_loop.inc"

}  // namespace ace::cpu::avx2
#pragma GCC pop_options
#endif
