// balance_mean_: one warp for each row exchanges kept and removed weights while the row's cost falls (core/balance.h).
//
// Contract
//   mask       [rows, cols], rewritten; swaps [rows] is the number of swaps, -1 where the row was left unchanged.
//   ties       the lower restored column first, then the lower removed one.
//   same bits  as the CPU: a lane of the warp is a lane of the contract, and lanes are added by halves.
//   refused    a row with a weight that is not finite is left unchanged, and every row if variance or mean is not
//              finite or a variance is negative; the flag is raised.
//
// Method: only one lane reads its columns (with groups: its groups) and writes their mask, so rounds need no barrier. A
// warp reads 32 contiguous columns; with groups a lane's columns are contiguous. Candidates stay in registers, and a
// swap costs one warp reduction for each side. No shared or global scratch memory is needed. Compiled and run on the
// host only: not run on a GPU.
#pragma once

#include "core/balance.h"
#include "core/nm_select.h"
#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

static_assert(kLanes == kWarpSize, "a lane of the contract is a lane of a warp");
constexpr int kBalanceWarps = 4;   // rows that a block handles at a time
constexpr int kNone = 0x7fffffff;  // greater than every column

ACE_DEVICE float no_change() { return bits_float(0x7f800000u); }  // infinity: every candidate changes less

template <class T>
struct BalanceProblem {
  const T* weight;        // [rows, cols], rows `weight_stride` apart
  bool* mask;             // [rows, cols], rows `mask_stride` apart
  const float* variance;  // [cols]
  const float* mean;      // [cols]
  int64_t* swaps;         // [rows]
  int64_t rows, weight_stride, mask_stride, rounds;
  int cols, group_m;
};

// One warp's row.
template <class T>
struct WarpRow {
  const T* weight;
  bool* mask;
  const float* variance;
  const float* mean;
  int cols;

  ACE_DEVICE float value(int j) const { return to_float(weight[j]); }
  ACE_DEVICE Removal at(int j) const { return removal(value(j), variance[j], mean[j]); }
  ACE_DEVICE SearchTerms terms(int j, float twice_shift) const {
    return search_terms(value(j), variance[j], mean[j], twice_shift);
  }
};

// The same in every lane.
struct WarpState {
  double shift;   // s
  double shifts;  // a bound of the sum of |b| over the row
  int64_t swaps;
};

// A lane's candidate: what it would add to the removed weights, and its column; kNone if there is none.
struct Offer {
  Removal added;
  int column;
};

// The lane whose candidate changes the cost least at the shift s, the lower column among equals; -1 if there is none.
ACE_DEVICE int least_offer(const Offer& mine, double s) {
  double change = cost_change(mine.added, s);
  int column = mine.column, lane = lane_id();
  ACE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, change, distance);
    const int other_column = __shfl_xor_sync(kFullWarp, column, distance);
    const int other_lane = __shfl_xor_sync(kFullWarp, lane, distance);
    const bool before = other < change || (other == change && other_column < column);
    const bool better = other_column != kNone && (column == kNone || before);
    change = better ? other : change;
    column = better ? other_column : column;
    lane = better ? other_lane : lane;
  }
  return column == kNone ? -1 : lane;
}

ACE_DEVICE Offer offer_of(const Offer& mine, int lane) {
  return {{__shfl_sync(kFullWarp, mine.added.spread, lane), __shfl_sync(kFullWarp, mine.added.shift, lane)},
          __shfl_sync(kFullWarp, mine.column, lane)};
}

ACE_DEVICE bool lowers_cost(const Removal& added, double spreads, const WarpState& state, int cols) {
  const double rounding = balance_rounding(spreads, added.shift, state.shifts, cols, state.swaps);
  return cost_change(added, state.shift) < -rounding;
}

// False if the row, variance or mean has a value that cannot be used.
template <class T>
ACE_DEVICE bool start_row(const WarpRow<T>& row, WarpState* state) {
  double shift = 0.0;
  float size = 0.0f;
  bool usable = true;
  for (int j = lane_id(); j < row.cols; j += kWarpSize) {
    const float w = row.value(j);
    usable &= is_finite(w) && is_finite(row.mean[j]) && is_finite(row.variance[j]) && row.variance[j] >= 0.0f;
    shift += static_cast<double>(row.mask[j] ? 0.0f : w) * static_cast<double>(row.mean[j]);
    size += absolute(w * row.mean[j]);
  }
  *state = {warp_sum(shift), shifts_bound(warp_sum(size), row.cols), 0};
  usable = __ballot_sync(kFullWarp, !usable) == 0;
  __syncwarp();  // other lanes than the writers have read the mask, and shuffles and ballots do not order memory
  return usable;
}

// Writes a column's mask from the lane that reads it.
template <class T>
ACE_DEVICE void take_over(const WarpRow<T>& row, int column, bool kept, int lane) {
  if (lane_id() == lane) row.mask[column] = kept;
}

// The least change so far, and its column; the first among equals.
struct Least {
  float change = no_change();
  int column = kNone;
  ACE_DEVICE void offer(bool able, float other, int j) {
    const bool better = able && other < change;
    change = better ? other : change;
    column = better ? j : column;
  }
};

template <class T>
ACE_DEVICE void offer_column(const WarpRow<T>& row, int j, float twice_shift, Least* back, Least* out) {
  const SearchTerms terms = row.terms(j, twice_shift);
  const bool kept = row.mask[j];
  back->offer(!kept, terms.if_restored(), j);
  out->offer(kept, terms.if_removed(), j);
}

// --- any two of a row ---

template <class T>
ACE_DEVICE void offer_columns(const WarpRow<T>& row, float twice_shift, Offer* restored, Offer* removed) {
  Least back, out;
  for (int j = lane_id(); j < row.cols; j += kWarpSize) {
    offer_column(row, j, twice_shift, &back, &out);
  }
  *restored = {{0.0, 0.0}, back.column};
  *removed = {{0.0, 0.0}, out.column};
  if (back.column != kNone) restored->added = exchange({0.0, 0.0}, row.at(back.column));
  if (out.column != kNone) removed->added = row.at(out.column);
}

// Swaps the best candidates of both sides, each once, while a swap gains.
template <class T>
ACE_DEVICE void swap_in_row(const WarpRow<T>& row, WarpState* state) {
  Offer restored, removed;
  offer_columns(row, static_cast<float>(2.0 * state->shift), &restored, &removed);
  for (;;) {
    const int back_lane = least_offer(restored, state->shift);
    if (back_lane < 0) return;
    const Offer back = offer_of(restored, back_lane);
    const int out_lane = least_offer(removed, state->shift + back.added.shift);
    if (out_lane < 0) return;
    const Offer out = offer_of(removed, out_lane);
    const Removal added{out.added.spread + back.added.spread, out.added.shift + back.added.shift};
    if (!lowers_cost(added, out.added.spread - back.added.spread, *state, row.cols)) return;
    take_over(row, back.column, true, back_lane);
    take_over(row, out.column, false, out_lane);
    if (lane_id() == back_lane) restored.column = kNone;
    if (lane_id() == out_lane) removed.column = kNone;
    state->shift += added.shift;
    ++state->swaps;
  }
}

// --- two of a group ---

// A lane's pair: the column of `offer` is the restored one.
struct PairOffer {
  Offer offer;
  int removed;
  double spreads;  // of both
};

// One group's best weight to restore and best to remove, and the change of exchanging them; kNone if there is none.
struct GroupPair {
  float change;
  int restored, removed;
};

template <class T>
ACE_DEVICE GroupPair best_of_group(const WarpRow<T>& row, int first, int group_m, float twice_shift) {
  Least back, out;
  for (int j = first; j < first + group_m; ++j) {
    offer_column(row, j, twice_shift, &back, &out);
  }
  if (back.column == kNone || out.column == kNone) return {no_change(), kNone, kNone};
  return {back.change + out.change, back.column, out.column};
}

template <class T>
ACE_DEVICE PairOffer offer_pair(const WarpRow<T>& row, int group_m, float twice_shift) {
  GroupPair best{no_change(), kNone, kNone};
  const int groups = row.cols / group_m;
  for (int group = lane_id(); group < groups; group += kWarpSize) {
    const GroupPair pair = best_of_group(row, group * group_m, group_m, twice_shift);
    if (pair.change < best.change) best = pair;
  }
  if (best.restored == kNone) return {{{0.0, 0.0}, kNone}, kNone, 0.0};
  const Removal out = row.at(best.removed), back = row.at(best.restored);
  return {{exchange(out, back), best.restored}, best.removed, out.spread + back.spread};
}

// Swaps pairs, each once, while a swap gains.
template <class T>
ACE_DEVICE void swap_in_groups(const WarpRow<T>& row, int group_m, WarpState* state) {
  PairOffer pair = offer_pair(row, group_m, static_cast<float>(2.0 * state->shift));
  for (;;) {
    const int lane = least_offer(pair.offer, state->shift);
    if (lane < 0) return;
    const Offer best = offer_of(pair.offer, lane);
    if (!lowers_cost(best.added, __shfl_sync(kFullWarp, pair.spreads, lane), *state, row.cols)) return;
    take_over(row, best.column, true, lane);
    take_over(row, pair.removed, false, lane);
    if (lane_id() == lane) pair.offer.column = kNone;
    state->shift += best.added.shift;
    ++state->swaps;
  }
}

template <class T, bool kGroups>
__global__ void __launch_bounds__(kBalanceWarps* kWarpSize)
    balance_mean_kernel(BalanceProblem<T> problem, NotFinite report) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBalanceWarps + warp_id();
  for (int64_t i = first; i < problem.rows; i += static_cast<int64_t>(gridDim.x) * kBalanceWarps) {
    const WarpRow<T> row{problem.weight + i * problem.weight_stride, problem.mask + i * problem.mask_stride,
                         problem.variance, problem.mean, problem.cols};
    WarpState state;
    if (!start_row(row, &state)) {
      if (lane_id() == 0) {
        problem.swaps[i] = -1;
        raise_flag(report);
      }
      continue;
    }
    for (int64_t round = 0; round < problem.rounds; ++round) {
      const int64_t before = state.swaps;
      if constexpr (kGroups) {
        swap_in_groups(row, problem.group_m, &state);
      } else {
        swap_in_row(row, &state);
      }
      if (state.swaps == before) break;
    }
    if (lane_id() == 0) problem.swaps[i] = state.swaps;
  }
}

}  // namespace ace::cuda
