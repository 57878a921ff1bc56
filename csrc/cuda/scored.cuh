// A weight with all that its formula reads, as raw pointers; keys of eight consecutive weights at a time, recomputed
// wherever they are needed. Products are rounded one by one (built with --fmad=false), so scores have the CPU's bits.
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
  bool weight_aligned, column_aligned, moment_aligned;  // every row starts on 16 bytes
};

// One row of it.
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

// Whether a pack of `count` columns is full and all that the formula reads is aligned: what as_whole(row) says to the
// compiler, so that no branch remains around its loads.
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

// Whether all are finite: the product of such a number and 0 is a zero, of any other NaN.
template <int kCount>
ACE_DEVICE bool all_finite(const float* value) {
  float zero = 0.0f;
  ACE_UNROLL
  for (int n = 0; n < kCount; ++n) zero = fmaf(value[n], 0.0f, zero);
  return zero == 0.0f;
}

// Scores of columns j..j+count of a row, given their weights; finite ones beyond. False where one of them is not
// finite.
template <class F, class T>
ACE_DEVICE bool pack_scores(const ScoredRow<T>& row, int64_t j, int count, const Pack<T>& weight, Pack<float>* score) {
  Pack<float> column, moment, column_sum;
  if constexpr (F::kColumn) column = load_pack(row.column + j, count, row.column_aligned);
  if constexpr (F::kMoment) moment = load_pack(row.moment + j, count, row.moment_aligned);
  if constexpr (F::kSums) column_sum = load_pack(row.column_sum + j, count, row.column_aligned);
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) {
    ScoreTerms terms{0.0f, 0.0f, row.row_sum, 0.0f};
    if constexpr (F::kColumn) terms.column = column.value[e];
    if constexpr (F::kMoment) terms.moment = moment.value[e];
    if constexpr (F::kSums) terms.column_sum = column_sum.value[e];
    score->value[e] = F::value(to_float(weight.value[e]), terms);
  }
  return all_finite<kPack>(score->value);
}

// Keys of the same; 0, which no finite score has, beyond the row's end.
template <class F, class T>
ACE_DEVICE bool pack_keys(const ScoredRow<T>& row, int64_t j, int count, const Pack<T>& weight, Pack<uint32_t>* key) {
  Pack<float> score;
  const bool finite = pack_scores<F>(row, j, count, weight, &score);
  ACE_UNROLL
  for (int e = 0; e < kPack; ++e) key->value[e] = e < count ? order_key(score.value[e]) : 0u;
  return finite;
}

template <class T>
ACE_DEVICE Pack<T> load_weights(const ScoredRow<T>& row, int64_t j, int count) {
  return load_pack(row.weight + j, count, row.weight_aligned);
}

template <class F, class T>
ACE_DEVICE float score_at(const ScoredRow<T>& row, int64_t j) {
  ScoreTerms terms{0.0f, 0.0f, row.row_sum, 0.0f};
  if constexpr (F::kColumn) terms.column = row.column[j];
  if constexpr (F::kMoment) terms.moment = row.moment[j];
  if constexpr (F::kSums) terms.column_sum = row.column_sum[j];
  return F::value(to_float(row.weight[j]), terms);
}

// --- tiles: the work of a block where a group is not a row. Row-major, so that their order is that of the weights ---

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

// Visits this thread's packs of all tiles of a matrix of `cols` columns: body(row, first column, values in the row).
// Divides once, not for every tile.
template <class Body>
ACE_DEVICE void for_tile_packs(int64_t tiles, int64_t cols, Body&& body) {
  const int64_t end = tiles_per_row(cols) * kTileColumns;  // of a row, in whole tiles
  Tile tile = tile_at(blockIdx.x, cols);
  const Tile step = tile_at(gridDim.x, cols);
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const int64_t j = tile.first + static_cast<int64_t>(threadIdx.x) * kPack;
    if (j < cols) body(tile.row, j, pack_count(cols, j));
    tile = {tile.row + step.row, tile.first + step.first};
    if (tile.first >= end) tile = {tile.row + 1, tile.first - end};
  }
}

// Says that an op met something that is not finite: the flag keeps the largest code seen. See not_finite.h.
struct NotFinite {
  int* flag;
  int code;
};

ACE_DEVICE void raise_flag(const NotFinite& report) { atomicMax(report.flag, report.code); }

}  // namespace ace::cuda
