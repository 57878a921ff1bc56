// A weight with the inputs of its formula, as raw pointers. Keys are recomputed wherever they are needed, eight
// consecutive weights at a time. Each product is rounded (built with --fmad=false), so scores have the CPU's bits.
#pragma once

#include "core/order_key.h"
#include "core/score.h"
#include "cuda/vector.cuh"

namespace ace::cuda {

template <class T>
struct Scored {
  T* weight;                // [rows, cols], rows `stride` apart
  const float* column;      // [cols] or null
  const float* moment;      // [rows, cols] or null
  const float* row_sum;     // [rows] or null
  const float* column_sum;  // [cols] or null
  int64_t rows, cols, stride;
  bool weight_aligned, column_aligned, moment_aligned;  // every row is 16-byte aligned
};

// One row of a scored weight.
template <class T>
struct ScoredRow {
  T* weight;
  const float* column;
  const float* moment;
  const float* column_sum;
  float row_sum;
  int64_t cols;
  bool weight_aligned, column_aligned, moment_aligned;
};

template <class F, class T>
ACE_DEVICE ScoredRow<T> row_of(const Scored<T>& matrix, int64_t i) {
  return {matrix.weight + i * matrix.stride,
          matrix.column,
          F::kMoment ? matrix.moment + i * matrix.cols : nullptr,
          matrix.column_sum,
          F::kSums ? matrix.row_sum[i] : 0.0f,
          matrix.cols,
          matrix.weight_aligned,
          matrix.column_aligned,
          matrix.moment_aligned};
}

// Whether a pack of `count` columns is full and all inputs of the formula are aligned. as_whole(row) tells this to the
// compiler, so that no branch remains around the loads.
template <class F, class T>
ACE_DEVICE bool is_whole(const ScoredRow<T>& row, int count) {
  return count >= kPack && row.weight_aligned && (!(F::kColumn || F::kSums) || row.column_aligned) &&
         (!F::kMoment || row.moment_aligned);
}

template <class T>
ACE_DEVICE ScoredRow<T> as_whole(ScoredRow<T> row) {
  row.weight_aligned = row.column_aligned = row.moment_aligned = true;
  return row;
}

// Whether all are finite: a finite number times 0 is zero, any other is NaN.
template <int kCount>
ACE_DEVICE bool all_finite(const float* value) {
  float zero = 0.0f;
  ACE_UNROLL
  for (int n = 0; n < kCount; ++n) zero = fmaf(value[n], 0.0f, zero);
  return zero == 0.0f;
}

// The inputs of a formula for eight columns that do not depend on the row.
template <class F>
struct ColumnTerms {
  Words<float> factor, sum;
};

template <class F, class T>
ACE_DEVICE ColumnTerms<F> column_terms(const ScoredRow<T>& row, int64_t j, int count) {
  const bool whole = row.column_aligned && count >= kPack;
  ColumnTerms<F> terms{};
  if constexpr (F::kColumn) terms.factor = load_words(row.column + j, count, whole);
  if constexpr (F::kSums) terms.sum = load_words(row.column_sum + j, count, whole);
  return terms;
}

// Scores of columns j..j+count of a row, given their weights; finite values beyond. False if one of them is not finite.
template <class F, class T>
ACE_DEVICE bool pack_scores(const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t j, int count,
                            const Words<T>& weight, Pack<float>* score) {
  Words<float> moment;
  if constexpr (F::kMoment) moment = load_words(row.moment + j, count, row.moment_aligned && count >= kPack);
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    ScoreTerms terms{0.0f, 0.0f, row.row_sum, 0.0f};
    if constexpr (F::kColumn) terms.column = columns.factor.at(e);
    if constexpr (F::kMoment) terms.moment = moment.at(e);
    if constexpr (F::kSums) terms.column_sum = columns.sum.at(e);
    score->value[e] = F::value(weight.at(e), terms);
  }
  return all_finite<kPack>(score->value);
}

// Beyond the row's end the key is 0, which no finite score has.
ACE_DEVICE Pack<uint32_t> keys_of(const Pack<float>& score, int count) {
  Pack<uint32_t> key;
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) key.value[e] = e < count ? order_key(score.value[e]) : 0u;
  return key;
}

// The keys of these scores.
template <class F, class T>
ACE_DEVICE bool pack_keys(const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t j, int count,
                          const Words<T>& weight, Pack<uint32_t>* key) {
  Pack<float> score;
  const bool finite = pack_scores(row, columns, j, count, weight, &score);
  *key = keys_of(score, count);
  return finite;
}

template <class F, class T>
ACE_DEVICE bool pack_keys(const ScoredRow<T>& row, int64_t j, int count, const Words<T>& weight, Pack<uint32_t>* key) {
  return pack_keys(row, column_terms<F>(row, j, count), j, count, weight, key);
}

template <class T>
ACE_DEVICE Words<T> load_weights(const ScoredRow<T>& row, int64_t j, int count) {
  return load_words(row.weight + j, count, row.weight_aligned && count >= kPack);
}

template <class F, class T>
ACE_DEVICE float score_at(const ScoredRow<T>& row, int64_t j) {
  ScoreTerms terms{0.0f, 0.0f, row.row_sum, 0.0f};
  if constexpr (F::kColumn) terms.column = row.column[j];
  if constexpr (F::kMoment) terms.moment = row.moment[j];
  if constexpr (F::kSums) terms.column_sum = row.column_sum[j];
  return F::value(to_float(row.weight[j]), terms);
}

// --- tiles: a block's units of work if a group is not a row. Row-major, so that tiles are in the order of the weights
// ---

constexpr int kTileThreads = 256;
constexpr int64_t kTileColumns = kTileThreads * kPack;

ACE_HD int64_t tiles_per_row(int64_t cols) { return (cols + kTileColumns - 1) / kTileColumns; }

struct Tile {
  int64_t row, first;  // first column
};

ACE_DEVICE Tile tile_at(int64_t tile, int64_t cols) {
  const int64_t per_row = tiles_per_row(cols);
  const int64_t row = tile / per_row;
  return {row, (tile - row * per_row) * kTileColumns};
}

// The tiles of this block: a grid-stride loop that divides once, not for every tile.
class TileWalk {
 public:
  ACE_DEVICE TileWalk(int64_t tiles, int64_t cols)
      : tiles_(tiles),
        end_(tiles_per_row(cols) * kTileColumns),
        index_(blockIdx.x),
        tile_(tile_at(blockIdx.x, cols)),
        step_(tile_at(gridDim.x, cols)) {}

  ACE_DEVICE bool more() const { return index_ < tiles_; }
  ACE_DEVICE int64_t index() const { return index_; }
  ACE_DEVICE int64_t row() const { return tile_.row; }
  ACE_DEVICE int64_t column() const {
    return tile_.first + static_cast<int64_t>(threadIdx.x) * kPack;
  }  // this thread's

  ACE_DEVICE void next() {
    index_ += gridDim.x;
    tile_ = {tile_.row + step_.row, tile_.first + step_.first};
    if (tile_.first >= end_) tile_ = {tile_.row + 1, tile_.first - end_};
  }

 private:
  int64_t tiles_, end_, index_;  // end_: end of a row, in whole tiles
  Tile tile_, step_;
};

// Visits this thread's packs of all tiles of a matrix of `cols` columns: body(row, first column, values in the row).
template <class Body>
ACE_DEVICE void for_tile_packs(int64_t tiles, int64_t cols, Body&& body) {
  for (TileWalk walk(tiles, cols); walk.more(); walk.next()) {
    const int64_t j = walk.column();
    if (j < cols) body(walk.row(), j, pack_count(cols, j));
  }
}

// If the order of packs does not matter, a tile has several rows, which share the columns' terms and whose weights are
// loaded together.
constexpr int kTileRows = 4;

ACE_HD int64_t tall_tiles(int64_t rows, int64_t cols) {
  return (rows + kTileRows - 1) / kTileRows * tiles_per_row(cols);
}

// Visits this thread's packs of all tall tiles: body(row, columns, i, j, count, weight).
template <class F, class T, class Body>
ACE_DEVICE void for_scored_packs(const Scored<T>& matrix, int64_t tiles, Body&& body) {
  for_tile_packs(tiles, matrix.cols, [&](int64_t rows, int64_t j, int count) {
    const int64_t first = rows * kTileRows;
    const ScoredRow<T> row = row_of<F>(matrix, first);
    if (first + kTileRows <= matrix.rows && is_whole<F>(row, count)) {
      Words<T> weight[kTileRows];
      ACE_UNROLL
      for (int r = 0; r < kTileRows; ++r) weight[r] = load_words(row.weight + r * matrix.stride + j);
      const ColumnTerms<F> columns = column_terms<F>(as_whole(row), j, kPack);
      ACE_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        body(as_whole(row_of<F>(matrix, first + r)), columns, first + r, j, kPack, weight[r]);
      }
      return;
    }
    for (int64_t i = first; i < first + kTileRows && i < matrix.rows; ++i) {
      const ScoredRow<T> one = row_of<F>(matrix, i);
      body(one, column_terms<F>(one, j, count), i, j, count, load_weights(one, j, count));
    }
  });
}

// Reports that an op met a value that is not finite: the flag keeps the largest code. See not_finite.h.
struct NotFinite {
  int* flag;
  int code;
};

ACE_DEVICE void raise_flag(const NotFinite& report) { atomicMax(report.flag, report.code); }

}  // namespace ace::cuda
