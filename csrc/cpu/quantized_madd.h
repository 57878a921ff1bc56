// The product with a packed matrix of quantized survivors for AVX2, for a few bfloat16 or float16 tokens. Two tables
// give the byte shuffle that moves sixteen codes to their columns; then they are multiplied, as integers of 16 bits,
// with a token of such integers (quantized_fixed.h). A lane's sum over a span is exact, below 2^26; then it is
// multiplied with scale and unit.
//
// 64 columns of a row take 0.78 of the time of the loop in float32 (quantized_avx2.h) for one token with 8 bits, 0.74
// with 4, and 0.5 for four tokens (AMD Zen 4, rows in the second-level cache). What bounds one token is the number of
// instructions, 13.5 for sixteen columns, of which two rows share the load of x.
#pragma once

#include "cpu/quantized_avx2.h"
#include "cpu/quantized_fixed.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)

namespace ace::cpu::avx2 {

// Byte shuffles for 16 columns are the sum of an entry for the first eight and one for the last eight. Entry `bits` has
// at each of its eight columns the place of the column's code, or 0x80 if there is none, which gives 0. At the other
// columns the first table has the number of its codes, the second 0.
template <bool kLast>
constexpr std::array<std::array<uint8_t, 16>, 256> make_code_places() {
  std::array<std::array<uint8_t, 16>, 256> table{};
  for (unsigned bits = 0; bits < 256; ++bits)
    for (unsigned c = 0; c < 8; ++c) {
      table[bits][c + 8 * kLast] = bits >> c & 1u ? static_cast<uint8_t>(place_of(bits, c)) : 0x80;
      if (!kLast) table[bits][c + 8] = static_cast<uint8_t>(place_of(bits, 8));
    }
  return table;
}
alignas(64) inline constexpr auto kFirstPlaces = make_code_places<false>();
alignas(64) inline constexpr auto kLastPlaces = make_code_places<true>();

}  // namespace ace::cpu::avx2

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2")
namespace ace::cpu::avx2 {

// The first 8 numbers of x, of which `left` exist; the others are 0.
template <class S>
ACE_HD __m256 load_wide(const S* x, int64_t left) {
  S some[8]{};
  if (__builtin_expect(left < 8, 0)) {
    if (left > 0) std::memcpy(some, x, sizeof(S) * static_cast<size_t>(left));
    x = some;
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (std::is_same_v<S, Half>) return _mm256_cvtph_ps(halves);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// A token in bytes: n_j of all columns, 16 bits each; then for each span the float 2^e. A Token of EachToken
// (quantized_level.h).
struct FixedHalves {
  static constexpr int64_t kWord = 2 * kBitmapColumns;

  static int64_t span_words(int64_t group_words) { return group_words % 2 == 0 ? 2 : 1; }
  static int64_t size(int64_t words, int64_t group_words) {
    const int64_t span = span_words(group_words);
    return words * kWord + (words + span - 1) / span * 4;
  }
  // Writes one span of `words` words, from x [cols], zero beyond, and returns 2^e.
  template <class S>
  static float write_span(const S* x, int64_t cols, int64_t words, uint8_t* out) {
    const __m256i absolute = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < words * kBitmapColumns; i += 8)
      most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(load_wide(x + i, cols - i)), absolute));
    uint32_t lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
    const FixedUnit unit(*std::max_element(lanes, lanes + 8));
    const __m256 inverse = _mm256_set1_ps(unit.inverse());
    const auto eight = [&](int64_t i)
                           ACE_FOLD { return _mm256_cvtps_epi32(_mm256_mul_ps(load_wide(x + i, cols - i), inverse)); };
    for (int64_t i = 0; i < words * kBitmapColumns; i += 16, out += 32) {
      constexpr int kInOrder = 0xd8;  // of the quarters 0, 2, 1, 3
      const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(eight(i), eight(i + 8)), kInOrder);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
    }
    return unit.value();
  }
  template <class S>
  static void write(const S* x, int64_t cols, int64_t words, int64_t group_words, uint8_t* out) {
    const int64_t span = span_words(group_words);
    uint8_t* units = out + words * kWord;
    for (int64_t word = 0; word < words; word += span, units += 4) {
      const int64_t first = word * kBitmapColumns;
      const float unit = write_span(x + first, cols - first, std::min(span, words - word), out + word * kWord);
      std::memcpy(units, &unit, sizeof unit);
    }
  }
};

// What decoded_row (quantized_loop.inc) asks for. Codes of 4 bits are put in the upper half of a byte: 2^kShift times
// the code.
template <int kBits>
struct ByteCodes {
  using T = int8_t;
  static constexpr int kDecoded = 64, kShift = 8 - kBits;

  template <int>
  static ACE_HD void decode(const uint8_t* codes, T* out) {
    auto* target = reinterpret_cast<__m256i*>(out);
    const auto* source = reinterpret_cast<const __m256i*>(codes);
    if constexpr (kBits == 8) {
      for (int i = 0; i < 2; ++i) _mm256_storeu_si256(target + i, _mm256_loadu_si256(source + i));
    } else {
      constexpr int kForUnpack = 0xd8;  // quarters 0, 2, 1, 3
      const __m256i bytes = _mm256_permute4x64_epi64(_mm256_loadu_si256(source), kForUnpack);
      const __m256i upper = _mm256_set1_epi8(-16);
      const __m256i even = _mm256_and_si256(_mm256_slli_epi16(bytes, 4), upper), odd = _mm256_and_si256(bytes, upper);
      _mm256_storeu_si256(target, _mm256_unpacklo_epi8(even, odd));
      _mm256_storeu_si256(target + 1, _mm256_unpackhi_epi8(even, odd));
    }
  }
};

// Shifts of a word that put its first 16, 32 and 48 bits at the top, for a count of them. In registers, hidden from the
// compiler: a shift by a constant would be two instructions.
struct TopShifts {
  int64_t by[4];

  ACE_HD TopShifts() : by{64, 48, 32, 16} {
#pragma GCC unroll 4
    for (int64_t& shift : by) __asm__("" : "+r"(shift));
  }
};

// Codes in the columns of step 0 to 3 of a word, as integers of 16 bits; 0 where there are none. `codes` begins with
// the word's first.
ACE_HD __m256i moved_codes(const int8_t* codes, uint64_t word, int step, const TopShifts& shifts) {
  constexpr uint64_t kEntry = 0xff0;  // 16 times a byte: where its entry begins
  const auto rotated = [word](int by) ACE_FOLD { return word >> by | word << (64 - by); };
  const auto entry = [](const auto& table, uint64_t place)
                         ACE_FOLD { return _mm_load_si128(reinterpret_cast<const __m128i*>(table[0].data() + place)); };
  const __m128i places = _mm_add_epi8(entry(kFirstPlaces, rotated((16 * step + 60) % 64) & kEntry),
                                      entry(kLastPlaces, rotated(16 * step + 4) & kEntry));
  const int before = step == 0 ? 0 : __builtin_popcountll(word << shifts.by[step]);
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + before));
  return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(sixteen, places));
}

// A row's bits and codes, both advanced by what is read, and the scales of its spans.
struct FixedRow {
  const uint8_t* bits;
  const int8_t* codes;
  const float* scales;
};

// Adds span number `span`, of kWords words, of these rows and tokens. x: its first n_j; units: the first token's 2^e.
template <int kBits, int kRows, int kTokens, int kWords>
ACE_HD void add_fixed_span(FixedRow* rows, const uint8_t* x, const uint8_t* units, int64_t stride, int64_t span,
                           const TopShifts& shifts, __m256 (*sums)[kTokens]) {
  __m256i part[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) part[r][t] = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int w = 0; w < kWords; ++w, x += FixedHalves::kWord) {
    uint64_t word[kRows];
    for (int r = 0; r < kRows; ++r) std::memcpy(&word[r], rows[r].bits + 8 * w, sizeof word[r]);
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
      __m256i weights[kRows];
      for (int r = 0; r < kRows; ++r) weights[r] = moved_codes(rows[r].codes, word[r], step, shifts);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * stride + 32 * step));
        for (int r = 0; r < kRows; ++r) {
          part[r][t] = _mm256_add_epi32(part[r][t], _mm256_madd_epi16(weights[r], n));
          __asm__("" : "+x"(part[r][t]));  // else the products of all steps would be kept, and added at the end
        }
      }
    }
    for (int r = 0; r < kRows; ++r) rows[r].codes += __builtin_popcountll(word[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    rows[r].bits += 8 * kWords;
    for (int t = 0; t < kTokens; ++t) {
      float unit;
      std::memcpy(&unit, units + t * stride + 4 * span, sizeof unit);
      const __m256 factor = _mm256_set1_ps(rows[r].scales[span] * unit);
      const __m256i total = _mm256_srai_epi32(part[r][t], ByteCodes<kBits>::kShift);  // exact
      sums[r][t] = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(total), sums[r][t]);
    }
  }
}

// The sums of kRows rows with these tokens; out [kTokens, kRows].
template <int kBits, int kRows, int kTokens, int kSpan>
void multiply_fixed_block(const FixedRow* given, int64_t words, const uint8_t* x, int64_t stride, float* out,
                          int64_t out_stride) {
  const uint8_t* units = x + words * FixedHalves::kWord;
  FixedRow rows[kRows];
  __m256 sums[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = given[r];
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm256_setzero_ps();
  }
  const TopShifts shifts;
  int64_t span = 0;
  for (; span < words / kSpan; ++span, x += kSpan * FixedHalves::kWord) {
    if constexpr (kBits == 8)
      for (int r = 0; r < kRows; ++r) prefetch_values(rows[r].codes);
    add_fixed_span<kBits, kRows, kTokens, kSpan>(rows, x, units, stride, span, shifts, sums);
  }
  if (kSpan > 1 && words % kSpan != 0)
    add_fixed_span<kBits, kRows, kTokens, 1>(rows, x, units, stride, span, shifts, sums);
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[t * out_stride + r] = Avx2<float>::total(sums[r][t]);
}

// All tokens of kRows rows from `row` on. Up to four tokens share the codes in their columns.
template <int kBits, int kRows, int kSpan, class S>
void multiply_fixed_rows(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t row, void* memory) {
  const QuantizedMatrix<S>& matrix = product.matrix;
  const QuantizedSpace space(matrix.words);
  const Spans<kSpan> spans(matrix);
  FixedRow rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* scales = space.scales(memory) + r * spans.count;
    int8_t* buffer = space.codes<int8_t>(memory) + r * (matrix.words + 1) * kBitmapColumns;
    rows[r] = {matrix.bits(row + r), decoded_row<ByteCodes<kBits>, kBits>(matrix, row + r, buffer), scales};
    spans.scales(matrix, row + r, scales);
  }
  int64_t t = 0;
  const auto multiply = [&](auto* with) ACE_FOLD {
    with(rows, matrix.words, product.x + t * product.stride, product.stride, product.out + t * product.rows + row,
         product.rows);
  };
  for (; t + 4 <= tokens; t += 4) multiply(&multiply_fixed_block<kBits, kRows, 4, kSpan>);
  for (; t + 2 <= tokens; t += 2) multiply(&multiply_fixed_block<kBits, kRows, 2, kSpan>);
  for (; t < tokens; ++t) multiply(&multiply_fixed_block<kBits, kRows, 1, kSpan>);
}

template <int kBits, int kSpan, class S>
void multiply_all_fixed(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t row, int64_t end,
                        void* memory) {
  constexpr int kRows = 2;
  for (; row + kRows <= end; row += kRows) multiply_fixed_rows<kBits, kRows, kSpan>(product, tokens, row, memory);
  for (; row < end; ++row) multiply_fixed_rows<kBits, 1, kSpan>(product, tokens, row, memory);
}

// All tokens, rows begin to end. x: FixedHalves, `stride` bytes apart.
template <int kBits, class S>
void fixed_product(const QuantizedProduct<S, uint8_t>& product, int64_t tokens, int64_t begin, int64_t end,
                   void* memory) {
  if (product.matrix.group_words % 2 == 0) return multiply_all_fixed<kBits, 2>(product, tokens, begin, end, memory);
  multiply_all_fixed<kBits, 1>(product, tokens, begin, end, memory);
}

}  // namespace ace::cpu::avx2
#pragma GCC pop_options
#endif
