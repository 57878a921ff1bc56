// restore_mean_: a warp a row adds up what was removed and moves what remains (core/restore.h).
//
// Contract
//   weight     [rows, cols], rewritten.
//   same bits  as the CPU: a lane of the warp is a lane of the contract, and lanes are added by halves.
//   refused    a row that holds or meets what is not finite, or a direction that has not the sign of its mean, is left
//   as
//              it was; the flag is raised.
//
// How: two passes over the row, 32 columns side by side; the second finds it in the cache. Nothing is shared.
// Compiled and run on the host only: not run on a GPU.
#pragma once

#include "core/restore.h"
#include "cuda/block.cuh"
#include "cuda/restore.h"
#include "cuda/scored.cuh"

namespace ace::cuda {

static_assert(kLanes == kWarpSize, "a lane of the contract is a lane of a warp");
constexpr int kRestoreWarps = 4;  // rows of a block at a time

ACE_DEVICE void restore_row(float* weight, const bool* mask, const RestoreArguments& of, const NotFinite& report) {
  double shift = 0.0, gain = 0.0;
  bool usable = true;
  for (int64_t j = lane_id(); j < of.cols; j += kWarpSize) {
    usable &= is_finite(weight[j]) && is_restorable(of.mean[j], of.direction[j]);
    const RestoreTerms terms = restore_terms(mask[j], weight[j], of.mean[j], of.direction[j]);
    shift += terms.shift;
    gain += terms.gain;
  }
  if (__ballot_sync(kFullWarp, !usable) != 0) {
    if (lane_id() == 0) raise_flag(report);
    return;
  }
  const double scale = restore_scale(warp_sum(shift), warp_sum(gain));
  for (int64_t j = lane_id(); j < of.cols; j += kWarpSize) {
    weight[j] = restored_weight(mask[j], weight[j], of.direction[j], scale);
  }
}

__global__ void __launch_bounds__(kRestoreWarps* kWarpSize) restore_mean_kernel(RestoreArguments of, NotFinite report) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRestoreWarps + warp_id();
  for (int64_t i = first; i < of.rows; i += static_cast<int64_t>(gridDim.x) * kRestoreWarps) {
    restore_row(of.weight + i * of.weight_stride, of.mask + i * of.mask_stride, of, report);
  }
}

}  // namespace ace::cuda
