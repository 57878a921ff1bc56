// A token of bfloat16 or float16 numbers as integers of 16 bits, for the loops that multiply codes with integers
// (quantized_madd.h, quantized_vnni.h).
//
// A token is cut into spans of one or two words. In a span, x_j is 2^e n_j with n_j rounded to an integer from -32639
// to 32639, and e the least exponent from -126 on with which all fit.
#pragma once

#include "cpu/quantized_matrix.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>

namespace ace::cpu {

// 2^e of a span.
class FixedUnit {
 public:
  // From the bits of its largest |x|.
  explicit ACE_HD FixedUnit(uint32_t largest)
      : finite_(largest < 0x7f800000u),
        // e + 127 for a largest x below 2^(e + 15), one more if that is above 32639 2^e.
        exponent_(std::max((largest >> 23) + ((largest & kMantissa) > kFits), 15u) - 14) {}
  ACE_HD float inverse() const { return bits_float((254 - exponent_) << 23); }
  // NaN if an x is not finite.
  ACE_HD float value() const { return bits_float(finite_ ? exponent_ << 23 : 0x7fc00000); }

 private:
  static constexpr uint32_t kMantissa = 0x7fffff, kFits = 32639u << 9 & kMantissa;
  bool finite_;
  uint32_t exponent_;
};

}  // namespace ace::cpu

namespace ace::cpu::avx512vnni {

// A token in bytes, n_j = 256 h_j + l_j with h_j and l_j from -128 to 127: for each span of kSpan words the first sums
// of 16 lanes, then the bytes h and l of each word; after the spans, for each the float 2^e. VNNI multiplies bytes
// without a sign with bytes that have one, so weights are codes plus kOffset, and the sums begin with -kOffset times
// the sum of n_j.
template <int kSpan>
struct FixedToken {
  static constexpr int64_t kSums = 64, kWord = 128, kBytes = kSums + kSpan * kWord;
  static int64_t spans(int64_t words) { return (words + kSpan - 1) / kSpan; }
  // A multiple of 64.
  static int64_t size(int64_t words) { return spans(words) * kBytes + (4 * spans(words) + 63) / 64 * 64; }
};

}  // namespace ace::cpu::avx512vnni

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
namespace ace::cpu::avx512vnni {

// The first 16 numbers of x, of which `left` exist; the others are 0.
template <class S>
ACE_HD __m512 load_wide(const S* x, int64_t left) {
  const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, x);
  if constexpr (std::is_same_v<S, Half>) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Writes one span of `words` words of a token, from x [cols], zero beyond, and returns 2^e.
template <int kOffset, class S>
float fix_span(const S* x, int64_t cols, int64_t words, uint8_t* out) {
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < words * kBitmapColumns; i += 16)
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(load_wide(x + i, cols - i)), absolute));
  const FixedUnit unit(_mm512_reduce_max_epu32(most));
  const __m512 inverse = _mm512_set1_ps(unit.inverse());
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i upper = _mm512_setzero_si512(), lower = upper;
  uint8_t* bytes = out + 64;
  for (int64_t word = 0; word < words; ++word, x += kBitmapColumns, cols -= kBitmapColumns, bytes += 128) {
    for (int64_t i = 0; i < kBitmapColumns; i += 16) {
      const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(load_wide(x + i, cols - i), inverse));
      const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + i), _mm512_cvtepi32_epi8(h));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 64 + i), _mm512_cvtepi32_epi8(n));
    }
    upper = _mm512_dpbusd_epi32(upper, ones, _mm512_loadu_si512(bytes));
    lower = _mm512_dpbusd_epi32(lower, ones, _mm512_loadu_si512(bytes + 64));
  }
  const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
  _mm512_storeu_si512(out, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-kOffset)));
  return unit.value();
}

// x [cols] as a FixedToken, out [size(words)].
template <int kOffset, int kSpan, class S>
void fix_token(const S* x, int64_t cols, int64_t words, uint8_t* out) {
  uint8_t* units = out + FixedToken<kSpan>::spans(words) * FixedToken<kSpan>::kBytes;
  for (int64_t word = 0; word < words; word += kSpan, out += FixedToken<kSpan>::kBytes, units += 4) {
    const int64_t first = word * kBitmapColumns;
    const float unit = fix_span<kOffset>(x + first, cols - first, std::min<int64_t>(kSpan, words - word), out);
    std::memcpy(units, &unit, sizeof unit);
  }
}

// A Token of EachToken (quantized_level.h).
template <int kOffset>
struct FixedInput {
  static int64_t size(int64_t words, int64_t group_words) {
    return group_words % 2 == 0 ? FixedToken<2>::size(words) : FixedToken<1>::size(words);
  }
  template <class S>
  static void write(const S* x, int64_t cols, int64_t words, int64_t group_words, uint8_t* out) {
    group_words % 2 == 0 ? fix_token<kOffset, 2>(x, cols, words, out) : fix_token<kOffset, 1>(x, cols, words, out);
  }
};

}  // namespace ace::cpu::avx512vnni
#pragma GCC pop_options
#endif
