// The product with a packed matrix of quantized survivors for AVX-512 with VBMI2 and bf16 instructions, for a few
// bfloat16 tokens. The 64 codes of a word are expanded as bytes, at once, and become bfloat16, exactly, by tables in
// registers.
//
// Expansion and multiplication of a word are a long chain of instructions. Therefore words are expanded one span ahead
// of their multiplication: measured (AMD Zen 4), 10.8 to 9.9 cycles for 64 columns of 8 bits.
#pragma once

#include "cpu/quantized_avx512.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)

namespace ace::cpu::avx512bf16 {

// The lower and the upper bytes of the bfloat16 numbers 0 to 127.
constexpr std::array<uint8_t, 128> make_code_bytes(bool upper) {
  std::array<uint8_t, 128> table{};
  for (unsigned code = 1; code < 128; ++code) {
    unsigned exponent = 0;
    while (code >> (exponent + 1)) ++exponent;
    const unsigned bits = (127 + exponent) << 7 | (code << (7 - exponent) & 127u);
    table[code] = static_cast<uint8_t>(upper ? bits >> 8 : bits);
  }
  return table;
}
alignas(64) inline constexpr auto kLowerBytes = make_code_bytes(false);
alignas(64) inline constexpr auto kUpperBytes = make_code_bytes(true);

// Bytes 4 k to 4 k + 4 for byte 8 k and those after it: the eight halves of bytes from half 8 k or 8 k + 1 on.
constexpr std::array<uint8_t, 64> make_spread() {
  std::array<uint8_t, 64> table{};
  for (unsigned i = 0; i < 64; ++i) table[i] = static_cast<uint8_t>(i / 8 * 4 + (i % 8 < 4 ? i % 8 : 4));
  return table;
}
alignas(64) inline constexpr auto kSpread = make_spread();

// The bit at which half i % 8 begins, if the first one is the lower or the upper half of a byte.
constexpr std::array<std::array<uint8_t, 64>, 2> make_shifts() {
  std::array<std::array<uint8_t, 64>, 2> table{};
  for (unsigned upper = 0; upper < 2; ++upper)
    for (unsigned i = 0; i < 64; ++i) table[upper][i] = static_cast<uint8_t>(4 * (i % 8 + upper));
  return table;
}
alignas(64) inline constexpr auto kShifts = make_shifts();

}  // namespace ace::cpu::avx512bf16

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16")
namespace ace::cpu::avx512bf16 {

struct Pair {
  __m512i first, second;  // 32 bfloat16 weights each
};

// Codes of 8 bits. Places count them.
struct Codes8 {
  static constexpr int kBits = 8;
  // Where a column of a word is in its pair of weights.
  static constexpr int64_t order(int64_t column) { return column / 8 % 2 * 32 + column / 16 * 8 + column % 8; }

  __m512i lower[2], upper[2];

  static ACE_HD Codes8 load() {
    return {{_mm512_load_si512(kLowerBytes.data()), _mm512_load_si512(kLowerBytes.data() + 64)},
            {_mm512_load_si512(kUpperBytes.data()), _mm512_load_si512(kUpperBytes.data() + 64)}};
  }

  ACE_HD __m512i expand(const uint8_t* codes, int64_t place, uint64_t bits) const {
    return _mm512_mask_expand_epi8(avx512::new_zero(), _cvtu64_mask64(bits), avx512::in_register(codes + place));
  }
  // -128 has no entry in the tables: its index is 0, and its upper byte is 0xc3.
  ACE_HD Pair weights(__m512i codes) const {
    const __m512i sign = _mm512_set1_epi8(-128), size = _mm512_abs_epi8(codes);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], size, lower[1]);
    const __m512i found = _mm512_permutex2var_epi8(upper[0], size, upper[1]);
    const __m512i with_sign = _mm512_or_si512(found, _mm512_and_si512(codes, sign));
    const __m512i high = _mm512_mask_mov_epi8(with_sign, _mm512_cmpeq_epi8_mask(codes, sign), _mm512_set1_epi8('\xc3'));
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
};

// Codes of 4 bits: bytes whose upper halves are arbitrary.
struct Codes4 {
  static constexpr int kBits = 4;
  static constexpr int64_t order(int64_t column) { return column % 2 * 32 + column / 2; }

  __m512i spread, table;

  static ACE_HD Codes4 load() {
    return {_mm512_load_si512(kSpread.data()), _mm512_load_si512(avx512::kHalfCodes.data())};
  }

  ACE_HD __m512i expand(const uint8_t* codes, int64_t place, uint64_t bits) const {
    const __m512i bytes = _mm512_permutexvar_epi8(spread, _mm512_loadu_si512(codes + place / 2));
    const __m512i halves = _mm512_multishift_epi64_epi8(_mm512_load_si512(kShifts[place % 2].data()), bytes);
    return _mm512_mask_expand_epi8(avx512::new_zero(), _cvtu64_mask64(bits), halves);
  }
  ACE_HD Pair weights(__m512i codes) const {
    return {_mm512_permutexvar_epi16(codes, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table)};
  }
};

// One row: `codes` from its begin on, from which 64 words codes and 64 bytes can be read.
template <class Codes>
struct CodedRow {
  const uint8_t *bits, *codes;
  uint64_t place;

  ACE_HD __m512i next(const Codes& format) {
    uint64_t word;
    std::memcpy(&word, bits, sizeof word);
    bits += sizeof word;
    const __m512i found = format.expand(codes, static_cast<int64_t>(place), word);
    place += static_cast<uint64_t>(__builtin_popcountll(word));
    return found;
  }
};

// Adds, for each token, scale times the product of kWords words.
template <class Codes, int kTokens, int kWords>
ACE_HD void add_span(const Codes& format, const __m512i* words, const BFloat16* x, int64_t stride, float scale,
                     __m512* sums) {
  __m512 part[kTokens][2];
  for (int t = 0; t < kTokens; ++t) part[t][0] = part[t][1] = _mm512_setzero_ps();
  for (int w = 0; w < kWords; ++w) {
    const Pair weights = format.weights(words[w]);
    for (int t = 0; t < kTokens; ++t) {
      const BFloat16* input = x + t * stride + w * kBitmapColumns;
      part[t][0] = Avx512Bf16::add(part[t][0], weights.first, input);
      part[t][1] = Avx512Bf16::add(part[t][1], weights.second, input + 32);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    sums[t] = _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_add_ps(part[t][0], part[t][1]), sums[t]);
}

// The sums of one row with these tokens. There is at least one word.
template <class Codes, int kTokens, int kSpan>
ACE_HD void multiply_row(CodedRow<Codes> row, const float* scales, int64_t words, const BFloat16* x, int64_t stride,
                         float* out, int64_t out_stride) {
  const Codes format = Codes::load();
  __m512 sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = _mm512_setzero_ps();
  const int64_t spans = words / kSpan;
  if (spans > 0) {
    __m512i ahead[kSpan];
    for (__m512i& word : ahead) word = row.next(format);
    for (int64_t i = 0; i + 1 < spans; ++i, x += kSpan * kBitmapColumns) {
      prefetch_values(row.codes + row.place * Codes::kBits / 8);
      __m512i now[kSpan];
      for (int w = 0; w < kSpan; ++w) {
        now[w] = ahead[w];
        ahead[w] = row.next(format);
      }
      add_span<Codes, kTokens, kSpan>(format, now, x, stride, *scales++, sums);
    }
    add_span<Codes, kTokens, kSpan>(format, ahead, x, stride, *scales++, sums);
    x += kSpan * kBitmapColumns;
  }
  if (spans * kSpan < words) {
    const __m512i last = row.next(format);
    add_span<Codes, kTokens, 1>(format, &last, x, stride, *scales, sums);
  }
  for (int t = 0; t < kTokens; ++t) out[t * out_stride] = Avx512Bf16::total(sums[t]);
}

// All tokens, rows begin to end; x is in the order of Codes. Up to four tokens share an expanded weight.
template <class Codes, int kSpan>
void multiply_rows(const QuantizedProduct<BFloat16, BFloat16>& product, int64_t tokens, int64_t begin, int64_t end,
                   void* memory) {
  const QuantizedMatrix<BFloat16>& matrix = product.matrix;
  const QuantizedSpace space(matrix.words);
  const Spans<kSpan> spans(matrix);
  float* scales = space.scales(memory);
  const int64_t readable = matrix.words * kBitmapColumns * Codes::kBits / 8 + 64;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = matrix.start(row);
    CodedRow<Codes> coded{matrix.bits(row), matrix.codes + start, 0};
    if (__builtin_expect(!matrix.whole(start, readable), 0)) {
      auto* last = space.codes<uint8_t>(memory);
      matrix.copy(start, readable, last);
      coded.codes = last;
    }
    spans.scales(matrix, row, scales);
    int64_t t = 0;
    const auto multiply = [&](auto count) ACE_FOLD {
      multiply_row<Codes, decltype(count)::value, kSpan>(coded, scales, matrix.words, product.x + t * product.stride,
                                                         product.stride, product.out + t * product.rows + row,
                                                         product.rows);
    };
    for (; t + 4 <= tokens; t += 4) multiply(std::integral_constant<int, 4>{});
    for (; t + 2 <= tokens; t += 2) multiply(std::integral_constant<int, 2>{});
    for (; t < tokens; ++t) multiply(std::integral_constant<int, 1>{});
  }
}

template <class Codes>
void quantized_product(const QuantizedProduct<BFloat16, BFloat16>& product, int64_t tokens, int64_t begin, int64_t end,
                       void* memory) {
  if (product.matrix.group_words % 2 == 0) return multiply_rows<Codes, 2>(product, tokens, begin, end, memory);
  multiply_rows<Codes, 1>(product, tokens, begin, end, memory);
}

}  // namespace ace::cpu::avx512bf16
#pragma GCC pop_options
#endif
