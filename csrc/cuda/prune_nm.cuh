// prune_nm_ and nm_mask: keeps the best keep_n of each group of group_m consecutive columns, in one pass, in registers.
//
// Contract
//   weight     [rows, cols], group_m divides cols; pruned entries become +0.0, kept ones keep their bits. Or it is only
//              read, and mask [rows, cols] is written instead.
//   ties       among equal scores the lower column first.
//   not finite a group with a score that is not finite is left unchanged (mask: all True); the flag is raised.
#pragma once

#include "core/nm_select.h"
#include "cuda/block.cuh"
#include "cuda/outcome.cuh"

namespace ace::cuda {

// Whether fewer than 1, 2 or 3 other values of the group beat a value, as functions of its three comparisons.
struct NeverBeaten {
  static ACE_HD constexpr unsigned table(unsigned a, unsigned b, unsigned c) { return ~(a | b | c) & 0xffu; }
};
struct BeatenOnce {
  static ACE_HD constexpr unsigned table(unsigned a, unsigned b, unsigned c) {
    return ~((a & b) | (a & c) | (b & c)) & 0xffu;
  }
};
struct BeatenTwice {
  static ACE_HD constexpr unsigned table(unsigned a, unsigned b, unsigned c) { return ~(a & b & c) & 0xffu; }
};

// Sets the sign bit of kept[e] if value e, a number, is among the keep_n best of its group, the lower column first
// among equals: if fewer than keep_n others beat it. For groups of 2 or 4, in which each pair is compared once.
template <int kGroup>
ACE_DEVICE void keep_best_signs(const float* value, int keep_n, uint32_t* kept) {
  static_assert(kGroup == 2 || kGroup == 4);
  if constexpr (kGroup == 2) {
    const uint32_t lost = less(value[0] + 0.0f, value[1]);
    kept[0] = keep_n == 1 ? ~lost : keep_n == 2 ? kSign : 0u;
    kept[1] = keep_n == 1 ? lost : kept[0];
  } else {
    const float first = value[0] + 0.0f, second = value[1] + 0.0f, third = value[2] + 0.0f;
    const uint32_t l01 = less(first, value[1]), l02 = less(first, value[2]), l03 = less(first, value[3]);
    const uint32_t l12 = less(second, value[2]), l13 = less(second, value[3]), l23 = less(third, value[3]);
    const auto by = [&](auto keep) {  // reverses the pairs in which the value is the later one
      using Keep = decltype(keep);
      kept[0] = bitwise<Keep::table(kBitA, kBitB, kBitC)>(l01, l02, l03);
      kept[1] = bitwise<Keep::table(~kBitA, kBitB, kBitC)>(l01, l12, l13);
      kept[2] = bitwise<Keep::table(~kBitA, ~kBitB, kBitC)>(l02, l12, l23);
      kept[3] = bitwise<Keep::table(~kBitA, ~kBitB, ~kBitC)>(l03, l13, l23);
    };
    switch (keep_n) {
      case 2: by(BeatenOnce{}); break;
      case 1: by(NeverBeaten{}); break;
      case 3: by(BeatenTwice{}); break;
      default: kept[0] = kept[1] = kept[2] = kept[3] = keep_n == 0 ? 0u : kSign;
    }
  }
}

// One row's eight columns, in whole groups. False if a score is not finite.
template <class F, int kGroup, class T, class Out>
ACE_DEVICE bool prune_nm_pack(const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t i, int64_t j, int count,
                              const Words<T>& weight, int keep_n, const Out& out) {
  Pack<float> score;
  const bool finite = pack_scores(row, columns, j, count, weight, &score);
  uint32_t kept[kPack];
  if constexpr (kGroup == kPack) {
    const uint32_t best = keep_best<kGroup>(score.value, kGroup, keep_n);
    ACE_UNROLL
    for (int e = 0; e < kPack; ++e) kept[e] = best << (31 - e);
  } else {
    ACE_UNROLL
    for (int first = 0; first < kPack; first += kGroup) {
      keep_best_signs<kGroup>(score.value + first, keep_n, kept + first);
    }
  }
  if (!finite) {
    ACE_UNROLL
    for (int first = 0; first < kPack; first += kGroup) {
      if (all_finite<kGroup>(score.value + first)) continue;
      ACE_UNROLL
      for (int e = 0; e < kGroup; ++e) kept[first + e] = kSign;
    }
  }
  out.write(row, i, j, count, kept, [&] { return weight; });
  return finite;
}

// Groups of 2, 4 or 8: a thread handles eight columns of several rows with 16-byte loads. Scores are compared as
// floats: zeros of both signs are equal, as are their order keys.
template <class F, class T, int kGroup, class Out>
__global__ void __launch_bounds__(kTileThreads)
    prune_nm_pack_kernel(Scored<T> matrix, int64_t tiles, int keep_n, Out out, NotFinite report) {
  static_assert(kPack % kGroup == 0);
  bool every_finite = true;
  for_scored_packs<F>(matrix, tiles,
                      [&](const ScoredRow<T>& row, const ColumnTerms<F>& columns, int64_t i, int64_t j, int count,
                          const Words<T>& weight) {
                        every_finite &= prune_nm_pack<F, kGroup>(row, columns, i, j, count, weight, keep_n, out);
                      });
  if (!every_finite) raise_flag(report);
}

// Columns that a warp handles at a time: whole groups, at most one column for each lane.
ACE_HD int warp_columns(int group_m) { return kWarpSize / group_m * group_m; }

// Groups of any size up to 32: one lane for each column, which counts its rank among the keys of its group's lanes. No
// thread indexes an array of keys, so everything stays in registers for any size.
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
      const uint32_t other = __shfl_sync(kFullWarp, key, group + g);  // past the last group: result not used
      rank += group + g < lane ? other >= key : other > key;
    }
    all_finite &= group_finite || !mine;
    if (mine) out.write_one(row, i, j, !group_finite || rank < keep_n);
  }
  if (!all_finite) raise_flag(report);
}

}  // namespace ace::cuda
