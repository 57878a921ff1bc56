// The product with a packed bfloat16 matrix for AVX-512 with bf16 instructions and no AMX, for five and more tokens. A
// panel of 64 rows is expanded into the second-level cache, once for all tokens, and multiplied in tiles of 64 rows and
// six tokens, whose sums stay in registers.
//
// Each row is a lane. Its columns are added in pairs, in order, in runs: each run's sum begins at 0, and the runs' sums
// are added in order. oneDNN's product of dense bfloat16 matrices (3.12, brg_matmul:avx512_core_bf16) does the same, so
// the result has the bits of torch's dense product (tested in python_tests/ops/test_packed.py). docs/payoff.md says
// what else was tried.
#pragma once

#include "cpu/packed_avx512.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")
namespace ace::cpu::avx512bf16 {

constexpr int kLanes = 16;                   // rows of a group
constexpr int kGroups = 4, kTileTokens = 6;  // of a tile: sums, weights and an input: 29 registers
constexpr int64_t kPanelRows = kGroups * kLanes;
constexpr int64_t kStep = 32;  // columns of a vector
constexpr int64_t kLongRun = 1024, kShortRun = 512;

// Columns of a run, as in oneDNN for two and more tokens.
inline int64_t run_columns(int64_t cols) { return cols > kLongRun ? kLongRun : kShortRun; }

// A panel: kPanelRows rows and some columns, up to a megabyte of weights.
struct PanelShape {
  int64_t words;         // of the bitmap, in each row: whole runs, or all
  int64_t stride;        // from row to row; the 32 avoids conflicts in the first-level cache
  int64_t step = kStep;  // from kStep columns of a row to the next; more in tiles
};

// The shape for rows of `words` words. Parts are long, or whole rows, because values are read from memory.
inline PanelShape panel_shape(int64_t words) {
  constexpr int64_t kMostWords = 128, kRunWords = kLongRun / kBitmapColumns;
  const int64_t parts = (words + kMostWords - 1) / kMostWords, width = (words + parts - 1) / parts;
  const int64_t whole = parts == 1 ? width : (width + kRunWords - 1) / kRunWords * kRunWords;
  return {whole, whole * kBitmapColumns + kStep};
}

// kStep columns of kLanes rows, `stride` apart: pair p of row r becomes lane r of the vector at p step.
inline void transpose_pairs(const BFloat16* panel, int64_t stride, BFloat16* out, int64_t step) {
  __m512i rows[kLanes], mixed[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) rows[r] = _mm512_load_si512(panel + r * stride);
    // Within quarters of vectors: quarter Q of entry 4 q + c gets pair 4 Q + c of rows 4 q to 4 q + 3.
#pragma GCC unroll 4
  for (int r = 0; r < kLanes; r += 4) {
    const __m512i a = _mm512_unpacklo_epi32(rows[r], rows[r + 1]), b = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[r + 2], rows[r + 3]);
    const __m512i d = _mm512_unpackhi_epi32(rows[r + 2], rows[r + 3]);
    mixed[r] = _mm512_unpacklo_epi64(a, c);
    mixed[r + 1] = _mm512_unpackhi_epi64(a, c);
    mixed[r + 2] = _mm512_unpacklo_epi64(b, d);
    mixed[r + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // Then quarters are exchanged.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(mixed[c], mixed[4 + c], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(mixed[c], mixed[4 + c], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(mixed[8 + c], mixed[12 + c], 0x44);
    const __m512i e = _mm512_shuffle_i32x4(mixed[8 + c], mixed[12 + c], 0xee);
    _mm512_store_si512(out + c * step, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_store_si512(out + (4 + c) * step, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_store_si512(out + (8 + c) * step, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_store_si512(out + (12 + c) * step, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}

// Multiplies kTokens tokens with one run of a panel's first groups, given as pairs [cols / 2, groups, kLanes, 2], and
// adds to sums [tokens, kPanelRows], multiplied by scales [kPanelRows] if they are given. Meanwhile it prefetches the
// next values, from `ahead`: two cache lines for each pair, which is what half of the weights take.
template <int groups, int kTokens>
void multiply_tile(const BFloat16* pairs, const BFloat16* x, int64_t stride, int64_t cols, const char* ahead,
                   const float* scales, float* sums) {
  __m512 tile[kTokens][groups];
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) tile[t][g] = _mm512_setzero_ps();
  for (int64_t column = 0; column < cols; column += 2, pairs += groups * kStep, ahead += 128) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    _mm_prefetch(ahead + 64, _MM_HINT_T1);
    __m512bh weights[groups];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) weights[g] = reinterpret_cast<__m512bh>(_mm512_load_si512(pairs + g * kStep));
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * stride + column, sizeof pair);
      const auto input = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) tile[t][g] = _mm512_dpbf16_ps(tile[t][g], weights[g], input);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      float* sum = sums + t * kPanelRows + g * kLanes;
      const __m512 before = _mm512_load_ps(sum);
      _mm512_store_ps(sum, scales ? _mm512_fmadd_ps(tile[t][g], _mm512_load_ps(scales + g * kLanes), before)
                                  : _mm512_add_ps(before, tile[t][g]));
    }
}

// A thread's working memory, all aligned to 64 bytes.
struct PanelSpace {
  BFloat16* panel;  // [kPanelRows, stride] of its shape
  BFloat16* pairs;  // [kLongRun / 2, kPanelRows, 2]
  float* sums;      // [tokens, kPanelRows]
};

// Multiplies one run of a panel's first groups with all tokens.
template <int groups>
void multiply_run(const BFloat16* panel, int64_t panel_stride, const BFloat16* x, int64_t stride, int64_t tokens,
                  int64_t cols, uintptr_t next, const float* scales, const PanelSpace& space) {
  for (int g = 0; g < groups; ++g)
    for (int64_t column = 0; column < cols; column += kStep)
      transpose_pairs(panel + g * kLanes * panel_stride + column, panel_stride,
                      space.pairs + (column / 2 * groups + g) * kStep, groups * kStep);
  for (int64_t t = 0; t < tokens; t += kTileTokens) {
    const int64_t left = tokens - t;
    const auto multiply = [&](auto* tile) ACE_FOLD {
      tile(space.pairs, x + t * stride, stride, cols, reinterpret_cast<const char*>(next), scales,
           space.sums + t * kPanelRows);
    };
    if (left >= 6) multiply(&multiply_tile<groups, 6>);
    if (left == 5) multiply(&multiply_tile<groups, 5>);
    if (left == 4) multiply(&multiply_tile<groups, 4>);
    if (left == 3) multiply(&multiply_tile<groups, 3>);
    if (left == 2) multiply(&multiply_tile<groups, 2>);
    if (left == 1) multiply(&multiply_tile<groups, 1>);
  }
}

// The rows of a packed matrix, as panel_product reads them.
struct PackedRows {
  PackedMatrix<BFloat16> matrix;

  int64_t words() const { return matrix.words; }
  int64_t begin(int64_t row) const { return matrix.start(row); }
  // Expands words first_word to first_word + words of rows first to first + count, and advances `places`, the place of
  // each row's next value.
  void expand(int64_t first, int64_t count, int64_t first_word, int64_t words, int64_t* places, const PanelShape& shape,
              BFloat16* panel) const {
    for (int64_t r = 0; r < count; ++r, panel += shape.stride) {
      int64_t place = places[r];
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t word = matrix.word(first + r, first_word + w);
        const auto low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
        const BFloat16* values = matrix.values + place;
        if (shape.step == kStep) prefetch_values(values);  // packed_tiles.h does it itself
        BFloat16 last[kBitmapColumns];
        if (__builtin_expect(!matrix.whole(place, kBitmapColumns), 0)) {
          matrix.copy(place, kBitmapColumns, last);
          values = last;
        }
        BFloat16* target = panel + 2 * w * shape.step;
        Avx512Bf16::store(target, Avx512Bf16::expand(values, low));
        Avx512Bf16::store(target + shape.step, Avx512Bf16::expand(values + __builtin_popcount(low), high));
        place += __builtin_popcountll(word);
      }
      places[r] = place;
    }
  }
  // The address of a row's value at this place.
  uintptr_t next(int64_t /*row*/, int64_t place) const {
    return reinterpret_cast<uintptr_t>(matrix.values) + sizeof(BFloat16) * static_cast<uintptr_t>(place);
  }
  // The address of what is read after a panel's part, advanced by as much as half of the weights of `columns` take.
  uintptr_t ahead(int64_t row, int64_t place, int64_t columns) const {
    return next(row, place + columns * kPanelRows / 2);
  }
  // Columns that are added before they are added to the sums, from this column on.
  static int64_t run(int64_t /*column*/, int64_t cols) { return run_columns(cols); }
  // The factors of a run's sums, or null.
  static const float* scales(int64_t /*first*/, int64_t /*count*/, int64_t /*column*/, float* /*space*/) {
    return nullptr;
  }
};

// One product: x [tokens, 64 words], zero beyond `cols` columns, tokens `stride` inputs apart; bias [rows] or null; out
// [tokens, rows].
template <class Rows>
struct PanelProduct {
  Rows matrix;
  int64_t cols;
  const BFloat16* x;
  int64_t stride, tokens;
  const BFloat16* bias;
  BFloat16* out;
  int64_t rows;
};

// Writes columns first to first + count of the result: sums + bias, rounded once. Subnormal results become 0.
template <class Rows>
void store_sums(const PanelProduct<Rows>& product, const float* sums, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const auto mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    __m512 shift = _mm512_setzero_ps();
    if (product.bias) {
      const __m256i stored = _mm256_maskz_loadu_epi16(mask, product.bias + first + i);
      shift = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(stored), 16));
    }
    for (int64_t t = 0; t < product.tokens; ++t) {
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + t * kPanelRows + i), shift);
      _mm256_mask_storeu_epi16(product.out + t * product.rows + first + i, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
  }
}

// Rows begin to end, any number of tokens. A row's sums do not depend on how rows are divided.
template <class Rows>
void panel_product(const PanelProduct<Rows>& product, int64_t begin, int64_t end, const PanelShape& shape,
                   const PanelSpace& space) {
  const Rows& matrix = product.matrix;
  for (int64_t first = begin; first < end; first += kPanelRows) {
    const int64_t count = std::min(kPanelRows, end - first), groups = (count + kLanes - 1) / kLanes;
    alignas(64) float factors[kPanelRows] = {};
    int64_t places[kPanelRows];
    for (int64_t r = 0; r < count; ++r) places[r] = matrix.begin(first + r);
    std::fill_n(space.sums, product.tokens * kPanelRows, 0.0f);
    for (int64_t word = 0; word < matrix.words(); word += shape.words) {
      const int64_t words = std::min(shape.words, matrix.words() - word), width = words * kBitmapColumns;
      const int64_t part = word * kBitmapColumns;
      matrix.expand(first, count, word, words, places, shape, space.panel);
      for (int64_t column = 0, cols = 0; column < width; column += cols) {
        cols = std::min(matrix.run(part + column, product.cols), width - column);
        const uintptr_t next = matrix.ahead(first + count - 1, places[count - 1], column);
        const float* scales = matrix.scales(first, count, part + column, factors);
        const auto multiply = [&](auto* with) ACE_FOLD {
          with(space.panel + column, shape.stride, product.x + part + column, product.stride, product.tokens, cols,
               next, scales, space);
        };
        if (groups == 4) multiply(&multiply_run<4>);
        if (groups == 3) multiply(&multiply_run<3>);
        if (groups == 2) multiply(&multiply_run<2>);
        if (groups == 1) multiply(&multiply_run<1>);
      }
    }
    store_sums(product, space.sums, first, count);
  }
}

}  // namespace ace::cpu::avx512bf16
#pragma GCC pop_options
#endif
