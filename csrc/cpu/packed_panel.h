// The product with a packed bfloat16 matrix for AVX-512 with bf16 instructions and no AMX, from some tokens on. A panel
// of rows and columns is expanded into the second cache, once for all tokens, and multiplied in tiles of four rows and
// six tokens, whose sums stay in registers.
#pragma once

#include "cpu/packed_avx512.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")
namespace ace::cpu::avx512bf16 {

constexpr int kTileRows = 4, kTileTokens = 6, kStep = 32;  // with a weight and an input for each: 29 registers
constexpr int64_t kMostRows = 128;                         // of a panel
constexpr int64_t kInputWords = 32;  // of the bitmap: the inputs of six tokens for them take half of the first cache

// A panel: some rows and columns, half a megabyte of weights. Fewer rows would have the inputs read more often.
struct PanelShape {
  int64_t rows;    // a multiple of kTileRows
  int64_t words;   // of the bitmap, in each row
  int64_t stride;  // from row to row. Without the 32, rows would be read from the same few places of the first cache.
};

// For rows of so many words. Long runs of values, or all of a row, because they come from memory.
inline PanelShape panel_shape(int64_t words) {
  constexpr int64_t kMostWords = 128, kPanelWords = 4096;
  const int64_t parts = (words + kMostWords - 1) / kMostWords;
  const int64_t width = (words + parts - 1) / parts;
  const int64_t rows = std::min(kMostRows, (kPanelWords / width + kTileRows - 1) / kTileRows * kTileRows);
  return {rows, width, width * kBitmapColumns + kStep};
}

// Words first_word to first_word + words of rows first to first + count; `places`, of each row's next value, move on.
inline void expand_panel(const PackedMatrix<BFloat16>& matrix, int64_t first, int64_t count, int64_t first_word,
                         int64_t words, int64_t* places, const PanelShape& shape, BFloat16* panel) {
  for (int64_t r = 0; r < count; ++r, panel += shape.stride) {
    int64_t place = places[r];
    for (int64_t w = 0; w < words; ++w) {
      const uint64_t word = matrix.word(first + r, first_word + w);
      const auto low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
      const BFloat16* values = matrix.values + place;
      prefetch_values(values);
      BFloat16 last[kBitmapColumns];
      if (__builtin_expect(!matrix.whole(place, kBitmapColumns), 0)) {
        matrix.copy(place, kBitmapColumns, last);
        values = last;
      }
      Avx512Bf16::store(panel + w * kBitmapColumns, Avx512Bf16::expand(values, low));
      Avx512Bf16::store(panel + w * kBitmapColumns + kStep, Avx512Bf16::expand(values + __builtin_popcount(low), high));
      place += __builtin_popcountll(word);
    }
    places[r] = place;
  }
}

// Sums of quarters: quarter q of the result is the sum of the quarters of vector q.
ACE_HD __m512 quarter_totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
}

// The totals of four tokens' sums with four rows: number 4 t + r of the result is that of token t and row r.
ACE_HD __m512 totals(const __m512 (&a)[4], const __m512 (&b)[4], const __m512 (&c)[4], const __m512 (&d)[4]) {
  __m512 row[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) row[r] = quarter_totals(a[r], b[r], c[r], d[r]);
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(row[0], row[1]), _mm512_unpackhi_ps(row[0], row[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(row[2], row[3]), _mm512_unpackhi_ps(row[2], row[3]));
  const __m512d even = _mm512_castps_pd(low), odd = _mm512_castps_pd(high);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
}

// Adds entries 4 t to 4 t + 3 of `found` to sums[t kMostRows], for kTokens tokens.
template <int kTokens>
ACE_HD void add_to(float* sums, __m512 found) {
  const auto add = [&](int t, __m128 part) ACE_FOLD {
    if (t < kTokens) _mm_store_ps(sums + t * kMostRows, _mm_add_ps(_mm_load_ps(sums + t * kMostRows), part));
  };
  add(0, _mm512_castps512_ps128(found));
  add(1, _mm512_extractf32x4_ps(found, 1));
  add(2, _mm512_extractf32x4_ps(found, 2));
  add(3, _mm512_extractf32x4_ps(found, 3));
}

// Four rows of a panel with kTokens tokens: adds to sums [tokens, kMostRows].
template <int kTokens>
void multiply_tile(const BFloat16* panel, int64_t panel_stride, const BFloat16* x, int64_t stride, int64_t cols,
                   float* sums) {
  __m512 tile[8][kTileRows];  // those of tokens that are not there stay zero
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) tile[t][r] = _mm512_setzero_ps();
  for (int64_t column = 0; column < cols; column += kStep) {
    __m512bh weights[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r)
      weights[r] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + r * panel_stride + column));
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const auto input = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + column));
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) tile[t][r] = _mm512_dpbf16_ps(tile[t][r], weights[r], input);
    }
  }
  add_to<kTokens>(sums, totals(tile[0], tile[1], tile[2], tile[3]));
  if constexpr (kTokens > 4) add_to<kTokens - 4>(sums + 4 * kMostRows, totals(tile[4], tile[5], tile[6], tile[7]));
}

// `rows` rows (rounded up to whole tiles) and `cols` columns of a panel with `tokens` tokens: adds to sums [tokens,
// kMostRows].
inline void multiply_panel(const PanelShape& shape, int64_t rows, const BFloat16* panel, const BFloat16* x,
                           int64_t stride, int64_t tokens, int64_t cols, float* sums) {
  for (int64_t t = 0; t < tokens; t += kTileTokens) {
    const int64_t left = tokens - t;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const auto multiply = [&](auto* tile) ACE_FOLD {
        tile(panel + r * shape.stride, shape.stride, x + t * stride, stride, cols, sums + t * kMostRows + r);
      };
      if (left >= 6) multiply(&multiply_tile<6>);
      if (left == 5) multiply(&multiply_tile<5>);
      if (left == 4) multiply(&multiply_tile<4>);
      if (left == 3) multiply(&multiply_tile<3>);
      if (left == 2) multiply(&multiply_tile<2>);
      if (left == 1) multiply(&multiply_tile<1>);
    }
  }
}

// One product: x [tokens, 64 words], zero beyond the columns, tokens `stride` inputs apart; bias [rows] or null; out
// [tokens, rows].
struct PanelProduct {
  PackedMatrix<BFloat16> matrix;
  const BFloat16* x;
  int64_t stride, tokens;
  const BFloat16* bias;
  BFloat16* out;
  int64_t rows;
};

// What a thread works in; both at addresses that 64 divides.
struct PanelSpace {
  BFloat16* panel;  // [rows, stride] of its shape
  float* sums;      // [tokens, kMostRows]
};

// Columns first to first + count of the result: sums + bias, rounded once. Subnormal results become 0.
inline void store_sums(const PanelProduct& product, const float* sums, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    __m512 shift = _mm512_setzero_ps();
    if (product.bias) {
      const __m256i stored = _mm256_maskz_loadu_epi16(mask, product.bias + first + i);
      shift = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    }
    for (int64_t t = 0; t < product.tokens; ++t) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + t * kMostRows + i), shift);
      _mm256_mask_storeu_epi16(product.out + t * product.rows + first + i, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
  }
}

// Rows begin to end, any number of tokens. Sums of a row do not depend on where the rows are divided.
inline void panel_product(const PanelProduct& product, int64_t begin, int64_t end, const PanelShape& shape,
                          const PanelSpace& space) {
  const PackedMatrix<BFloat16>& matrix = product.matrix;
  for (int64_t first = begin; first < end; first += shape.rows) {
    const int64_t count = std::min(shape.rows, end - first);
    int64_t places[kMostRows];
    for (int64_t r = 0; r < count; ++r) places[r] = matrix.start(first + r);
    std::fill_n(space.sums, product.tokens * kMostRows, 0.0f);
    for (int64_t word = 0; word < matrix.words; word += shape.words) {
      const int64_t words = std::min(shape.words, matrix.words - word);
      expand_panel(matrix, first, count, word, words, places, shape, space.panel);
      for (int64_t part = 0; part < words; part += kInputWords) {
        const int64_t cols = std::min(kInputWords, words - part) * kBitmapColumns;
        multiply_panel(shape, count, space.panel + part * kBitmapColumns, product.x + (word + part) * kBitmapColumns,
                       product.stride, product.tokens, cols, space.sums);
      }
    }
    store_sums(product, space.sums, first, count);
  }
}

}  // namespace ace::cpu::avx512bf16
#pragma GCC pop_options
#endif
