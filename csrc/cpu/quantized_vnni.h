// The product with a packed matrix of quantized survivors for AVX-512 with VBMI2 and VNNI, for a few bfloat16 or
// float16 tokens. Codes are expanded as bytes, and VNNI multiplies them with the two bytes of each number of a token
// (quantized_fixed.h). A lane's sum over a span is exact, below 2^26; then it is multiplied with scale and unit.
//
// The limit (AMD Zen 4, codes of 8 bits): multiplications, expansions, moves to masks and the last additions all need
// the two lower vector units, 4.8 cycles for 64 columns; measured are 6.4, rows in the second-level cache. So copies of
// registers and repeated loads are kept out of the loop. Four rows at a time share the loads of x; with one row at a
// time the loads would be the limit. On Zen 5 it is 3.6 to 4.0 cycles, and 4.1 to 4.6 with 4 bits: the units would
// allow 2.7 and 2.9, but loads that cross lines, and those of rows that are a power of two apart, wait for each other.
#pragma once

#include <array>

#include "cpu/quantized_avx512.h"
#include "cpu/quantized_fixed.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
namespace ace::cpu::avx512vnni {

// The bytes where bits are set, else 0. As one piece of assembly, so that the compiler does not copy the zero from a
// register, which takes longer than to make one.
ACE_HD __m512i expand_bytes(__m512i codes, uint64_t bits) {
  __m512i found;
  __asm__("vpxor %x0, %x0, %x0\n\tvpexpandb %1, %0%{%2%}" : "=&x"(found) : "v"(codes), "Yk"(_cvtu64_mask64(bits)));
  return found;
}

constexpr int64_t kBitsAhead = 4096, kCodesAhead = 16384;  // bytes

// Keeps the compiler from loading it again for each use.
ACE_HD __m512i load_once(const uint8_t* bytes) {
  __m512i wide = _mm512_loadu_si512(bytes);
  __asm__("" : "+v"(wide));
  return wide;
}

// Codes of 8 bits. A place is the address of a code; weights are codes plus kOffset.
struct Codes8 {
  static constexpr int kBits = 8, kOffset = 128;

  // The weights of a word whose codes begin at a place.
  static ACE_HD __m512i expand(uintptr_t place, uint64_t bits) {
    const __m512i codes = avx512::in_register(reinterpret_cast<const uint8_t*>(place));
    const __m512i found = expand_bytes(codes, bits);
    return _mm512_xor_si512(found, _mm512_set1_epi8(-128));
  }
};

// For an even and for an odd place: of each byte of 64 bits the lowest bit in the codes that begin there, so that a
// code is in the lower or in the upper half of its byte.
constexpr std::array<uint64_t, 2> make_code_shifts(bool upper) {
  std::array<uint64_t, 2> shifts{};
  for (uint64_t odd = 0; odd < 2; ++odd)
    for (uint64_t i = 0; i < 8; ++i) shifts[odd] |= 4 * (i + odd + (upper ? 15 : 0)) % 64 << 8 * i;
  return shifts;
}
inline constexpr auto kLowerShifts = make_code_shifts(false), kUpperShifts = make_code_shifts(true);

// 64 codes of 4 bits as bytes, whose other half is arbitrary. Each part of 64 bits gets the four bytes of its eight
// codes and the next four; then shifts give each code a byte.
ACE_HD __m512i decode_halves(uintptr_t place, const std::array<uint64_t, 2>& shifts) {
  const __m512i parts = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8);
  const __m512i wide = _mm512_permutexvar_epi32(parts, _mm512_loadu_si512(reinterpret_cast<const void*>(place >> 1)));
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(shifts[place & 1])), wide);
}

// Codes of 4 bits. A place is twice the address, plus 1 for the upper half of the byte.
struct Codes4 {
  static constexpr int kBits = 4, kOffset = 8;

  // Codes that are decoded before, into a buffer in the first-level cache, take longer, most with many columns (Zen 5).
  static ACE_HD __m512i expand(uintptr_t place, uint64_t bits) {
    const __m512i codes = decode_halves(place, kLowerShifts);
    const __m512i found = expand_bytes(codes, bits);
    return _mm512_ternarylogic_epi32(found, _mm512_set1_epi8(15), _mm512_set1_epi8(8), (0xf0 & 0xcc) ^ 0xaa);
  }
};

// The first byte of a row's codes, from which those of all columns and 64 bytes more can be read; in the buffer if the
// matrix ends too early.
template <class Codes, class S>
ACE_HD const uint8_t* readable_codes(const QuantizedMatrix<S>& matrix, int64_t row, uint8_t* buffer) {
  const int64_t start = matrix.start(row), readable = matrix.words * kBitmapColumns * Codes::kBits / 8 + 64;
  if (__builtin_expect(matrix.whole(start, readable), 1)) return matrix.codes + start;
  matrix.copy(start, readable, buffer);
  return buffer;
}

// One row: its bits, and the place of its codes, both advanced by what is read.
template <class Codes>
struct CodedRow {
  const uint8_t* bits;
  uintptr_t place;

  ACE_HD __m512i next() {
    uint64_t word;
    std::memcpy(&word, bits, sizeof word);
    bits += sizeof word;
    const __m512i found = Codes::expand(place, word);
    place += static_cast<uintptr_t>(__builtin_popcountll(word));
    return found;
  }
};

// Adds a span of kWords words of these rows and tokens. factors [kRows, kTokens], `spans` apart: scale times 2^e.
template <class Codes, int kRows, int kTokens, int kWords>
ACE_HD void add_span(CodedRow<Codes>* rows, const uint8_t* x, int64_t stride, const float* factors, int64_t spans,
                     __m512 (*sums)[kTokens]) {
  __m512i upper[kRows][kTokens], lower[kRows][kTokens];
  for (int t = 0; t < kTokens; ++t) {
    const __m512i first = load_once(x + t * stride);
    for (int r = 0; r < kRows; ++r) {
      upper[r][t] = _mm512_setzero_si512();
      lower[r][t] = first;
    }
  }
  for (int w = 0; w < kWords; ++w) {
    __m512i weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = rows[r].next();
    for (int t = 0; t < kTokens; ++t) {
      const uint8_t* bytes = x + t * stride + 64 + w * 128;
      const __m512i high = load_once(bytes), low = load_once(bytes + 64);
      for (int r = 0; r < kRows; ++r) {
        upper[r][t] = _mm512_dpbusd_epi32(upper[r][t], weights[r], high);
        lower[r][t] = _mm512_dpbusd_epi32(lower[r][t], weights[r], low);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(upper[r][t], 8), lower[r][t]);
      const __m512 factor = _mm512_set1_ps(factors[(r * kTokens + t) * spans]);
      sums[r][t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(total), sums[r][t]);
    }
}

// The sums of kRows rows with these tokens; out [kTokens, kRows].
template <class Codes, int kRows, int kTokens, int kSpan>
ACE_HD void multiply_block(const CodedRow<Codes>* given, const float* factors, int64_t words, const uint8_t* x,
                           int64_t stride, float* out, int64_t out_stride, BytesAhead& ahead) {
  const int64_t spans = FixedToken<kSpan>::spans(words);
  CodedRow<Codes> rows[kRows];
  __m512 sums[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = given[r];
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < words / kSpan; ++i, x += FixedToken<kSpan>::kBytes, ++factors) {
    ahead.next();
    add_span<Codes, kRows, kTokens, kSpan>(rows, x, stride, factors, spans, sums);
  }
  if (kSpan > 1 && words % kSpan != 0) add_span<Codes, kRows, kTokens, 1>(rows, x, stride, factors, spans, sums);
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[t * out_stride + r] = _mm512_reduce_add_ps(sums[r][t]);
}

// factors [kTokens, spans] of a row: its scales times the tokens' units.
template <int kTokens, int kSpan>
ACE_HD void multiply_scales(const float* scales, const uint8_t* x, int64_t stride, int64_t spans, float* factors) {
  for (int t = 0; t < kTokens; ++t) {
    const uint8_t* units = x + t * stride + spans * FixedToken<kSpan>::kBytes;
    for (int64_t i = 0; i < spans; i += 16) {
      const auto mask = static_cast<__mmask16>(spans - i >= 16 ? 0xffff : (1 << (spans - i)) - 1);
      const __m512 unit = _mm512_maskz_loadu_ps(mask, units + 4 * i), scale = _mm512_maskz_loadu_ps(mask, scales + i);
      _mm512_mask_storeu_ps(factors + t * spans + i, mask, _mm512_mul_ps(unit, scale));
    }
  }
}

// All tokens of kRows rows from `row` on. Up to four tokens share an expanded weight, and up to four rows x.
template <class Codes, int kRows, int kSpan, class S>
ACE_HD void multiply_rows(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t row, uint8_t* buffer,
                          float* scales) {
  const QuantizedMatrix<S>& matrix = product.matrix;
  const Spans<kSpan> spans(matrix);
  float* factors = scales + kRows * spans.count;
  CodedRow<Codes> coded[kRows];
  for (int r = 0; r < kRows; ++r) {
    const uint8_t* codes = readable_codes<Codes>(matrix, row + r, buffer + r * (matrix.words + 1) * kBitmapColumns);
    coded[r] = {matrix.bits(row + r), reinterpret_cast<uintptr_t>(codes) * (8 / Codes::kBits)};
    BytesAhead{reinterpret_cast<uintptr_t>(coded[r].bits) + kBitsAhead, 8 * matrix.words}.next();
    spans.scales(matrix, row + r, scales + r * spans.count);
  }
  constexpr int64_t kMost = kRows * kSpan * kBitmapColumns * Codes::kBits / 8;  // bytes of a span's codes
  const int64_t first = matrix.start(row), size = matrix.start(row + kRows) - first;
  const int64_t each = (size + spans.count - 1) / std::max<int64_t>(1, spans.count);  // there may be no columns
  // Codes of neighbouring rows are one sequence of bytes, of which each span takes a part.
  BytesAhead ahead{reinterpret_cast<uintptr_t>(matrix.codes + first) + kCodesAhead,
                   std::clamp<int64_t>(each, 0, kMost)};
  int64_t t = 0;
  const auto multiply = [&](auto count) ACE_FOLD {
    constexpr int kTokens = decltype(count)::value, kTogether = kTokens == 1 ? kRows : std::min(kRows, 2);
    const uint8_t* x = product.x + t * product.stride;
    for (int r = 0; r < kRows; ++r)
      multiply_scales<kTokens, kSpan>(scales + r * spans.count, x, product.stride, spans.count,
                                      factors + r * kTokens * spans.count);
    for (int r = 0; r < kRows; r += kTogether) {
      multiply_block<Codes, kTogether, kTokens, kSpan>(coded + r, factors + r * kTokens * spans.count, matrix.words, x,
                                                       product.stride, product.out + t * product.rows + row + r,
                                                       product.rows, ahead);
      ahead.each = 0;  // once for all tokens
    }
  };
  for (; t + 4 <= tokens; t += 4) multiply(std::integral_constant<int, 4>{});
  for (; t + 2 <= tokens; t += 2) multiply(std::integral_constant<int, 2>{});
  for (; t < tokens; ++t) multiply(std::integral_constant<int, 1>{});
}

// All tokens, rows begin to end, four at a time. Neighbours: then a thread reads two sequences of bytes, and the
// processor's prefetcher follows them.
template <class Codes, int kSpan, class S>
void multiply_all(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t begin, int64_t end,
                  void* memory) {
  constexpr int kRows = 4;
  const QuantizedSpace space(product.matrix.words);
  float* scales = space.scales(memory);
  auto* buffer = space.codes<uint8_t>(memory);
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) multiply_rows<Codes, kRows, kSpan>(product, tokens, row, buffer, scales);
  for (; row < end; ++row) multiply_rows<Codes, 1, kSpan>(product, tokens, row, buffer, scales);
}

// x: FixedInput<Codes::kOffset>, `stride` bytes apart.
template <class Codes, class S>
void quantized_product(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t begin, int64_t end,
                       void* memory) {
  if (product.matrix.group_words % 2 == 0) return multiply_all<Codes, 2>(product, tokens, begin, end, memory);
  multiply_all<Codes, 1>(product, tokens, begin, end, memory);
}

}  // namespace ace::cpu::avx512vnni
#pragma GCC pop_options
#endif
