// restore_mean_: one warp for each row adds up the removed weights and updates the remaining ones (core/restore.h).
//
// Contract
//   weight     [rows, cols], rewritten.
//   same bits  as the CPU: a lane of the warp is a lane of the contract, and lanes are added by halves.
//   refused    a row is left unchanged if it, mean or direction has a value that is not finite, or if a direction does
//              not have the sign of its mean; the flag is raised.
//
// Method: two passes over the row, 32 contiguous columns at a time; the second pass reads it from the cache. No shared
// memory. Compiled and run on the host only: not run on a GPU.
#pragma once

#include "core/restore.h"
#include "cuda/block.cuh"
#include "cuda/restore.h"
#include "cuda/scored.cuh"

namespace ace::cuda {

static_assert(kLanes == kWarpSize, "a lane of the contract is a lane of a warp");
constexpr int kRestoreWarps = 4;  // rows that a block handles at a time

ACE_DEVICE void restore_row(float* weight, const bool* mask, const RestoreArguments& of, const NotFinite& report) {
  double shift = 0.0, gain = 0.0;
  bool usable = true;
  for (int64_t j = lane_id(); j < of.cols; j += kWarpSize) {
    usable &= is_finite(weight[j]) && is_restorable(of.mean[j], of.direction[j]);
    const RestoreTerms terms = restore_terms(mask[j] ? 0.0f : weight[j], of.mean[j], mask[j] ? of.direction[j] : 0.0f);
    shift += terms.shift;
    gain += terms.gain;
  }
  if (__ballot_sync(kFullWarp, !usable) != 0) {
    if (lane_id() == 0) raise_flag(report);
    return;
  }
  const double scale = restore_scale(warp_sum(shift), warp_sum(gain));
  for (int64_t j = lane_id(); j < of.cols; j += kWarpSize) {
    weight[j] = mask[j] ? restored_weight(weight[j], of.direction[j], scale) : 0.0f;
  }
}

__global__ void __launch_bounds__(kRestoreWarps* kWarpSize) restore_mean_kernel(RestoreArguments of, NotFinite report) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRestoreWarps + warp_id();
  for (int64_t i = first; i < of.rows; i += static_cast<int64_t>(gridDim.x) * kRestoreWarps) {
    restore_row(of.weight + i * of.weight_stride, of.mask + i * of.mask_stride, of, report);
  }
}

}  // namespace ace::cuda
