// prune_nm_ and nm_mask: keeps the best keep_n of each group of group_m consecutive columns, in one pass, in registers.
//
// Contract
//   weight     [rows, cols], group_m divides cols; pruned entries become +0.0, kept ones keep their bits. Or it is
//              only read, and mask [rows, cols] says the same.
//   ties       among equal scores the lower column first.
//   not finite a group that holds a score that is not finite is left as it was (mask: all True); the flag is raised.
#pragma once

#include "core/nm_select.h"
#include "cuda/block.cuh"
#include "cuda/outcome.cuh"

namespace ace::cuda {

// A thread's eight columns of a row, whole groups. False where a score is not finite.
template <class F, int kGroup, class T, class Out>
ACE_DEVICE bool prune_nm_pack(const ScoredRow<T>& row, int64_t i, int64_t j, int count, int keep_n, const Out& out) {
  const Pack<T> weight = load_weights(row, j, count);
  Pack<float> score;
  pack_scores<F>(row, j, count, weight, &score);
  uint32_t kept = 0;
  bool every_finite = true;
  ACE_UNROLL
  for (int first = 0; first < kPack; first += kGroup) {
    const bool finite = all_finite<kGroup>(score.value + first);
    every_finite &= finite;
    const uint32_t best = keep_best<kGroup>(score.value + first, kGroup, keep_n);
    kept |= (finite ? best : (1u << kGroup) - 1u) << first;
  }
  out.write(row, i, j, count, kept & ((1u << count) - 1u), [&] { return weight; });
  return every_finite;
}

// Groups of 2, 4 or 8: a thread takes eight columns by one or two 16-byte loads. Scores are compared as floats: of two
// zeros neither is less, as of their order keys.
template <class F, class T, int kGroup, class Out>
__global__ void __launch_bounds__(kTileThreads)
    prune_nm_pack_kernel(Scored<T> matrix, int64_t tiles, int keep_n, Out out, NotFinite report) {
  static_assert(kPack % kGroup == 0);
  bool every_finite = true;
  for_tile_packs(tiles, matrix.cols, [&](int64_t i, int64_t j, int count) {
    const ScoredRow<T> row = row_of<F>(matrix, i);
    every_finite &= is_whole<F>(row, count) ? prune_nm_pack<F, kGroup>(as_whole(row), i, j, kPack, keep_n, out)
                                            : prune_nm_pack<F, kGroup>(row, i, j, count, keep_n, out);
  });
  if (!every_finite) raise_flag(report);
}

// Columns that a warp takes at a time: whole groups, at most one column a lane.
ACE_HD int warp_columns(int group_m) { return kWarpSize / group_m * group_m; }

// Any group of up to 32: a lane a column, its rank counted by looking at the keys of its group's lanes. Lanes have no
// array of keys that would have to be indexed, so nothing leaves the registers whatever the size.
template <class F, class T, class Out>
__global__ void __launch_bounds__(kTileThreads)
    prune_nm_lane_kernel(Scored<T> matrix, int keep_n, int group_m, Out out, NotFinite report) {
  constexpr int kWarps = kTileThreads / kWarpSize;
  const int columns = warp_columns(group_m), lane = lane_id();
  const int group = lane / group_m * group_m;  // the first lane of this lane's group
  const uint32_t group_lanes = (group_m == kWarpSize ? kFullWarp : (1u << group_m) - 1u) << group;
  const int64_t per_row = (matrix.cols + columns - 1) / columns, steps = matrix.rows * per_row;
  bool all_finite = true;
  for (int64_t step = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); step < steps;
       step += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t i = step / per_row;
    const ScoredRow<T> row = row_of<F>(matrix, i);
    const int64_t j = (step - i * per_row) * columns + lane;
    const bool mine = lane < columns && j < matrix.cols;
    const float score = mine ? score_at<F>(row, j) : 0.0f;
    const uint32_t key = order_key(score);
    const bool group_finite = (__ballot_sync(kFullWarp, !is_finite(score)) & group_lanes) == 0;
    int rank = 0;
    for (int g = 0; g < group_m; ++g) {
      const uint32_t other = __shfl_sync(kFullWarp, key, group + g);  // lanes past the last group read on; not used
      rank += group + g < lane ? other >= key : other > key;
    }
    all_finite &= group_finite || !mine;
    if (mine) out.write_one(row, i, j, !group_finite || rank < keep_n);
  }
  if (!all_finite) raise_flag(report);
}

}  // namespace ace::cuda
