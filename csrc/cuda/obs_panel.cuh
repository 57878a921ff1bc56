// Panels of the recursions over the columns of a block, obs_block_ and quantize_block_: one warp for several rows.
//
// Columns are handled in panels of at most 32 columns in whole groups, one lane for each column. A panel first applies
// the corrections of the preceding panels, whose errors the lanes read back and broadcast; then its own columns one
// after another, by shuffles. The recursion needs no barrier and no shared memory; the factor (64 KiB at 128 columns)
// is read from the L1 cache, once for all rows of a warp.
#pragma once

#include "core/obs_block.h"
#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kObsThreads = 128;
constexpr int kObsWarps = kObsThreads / kWarpSize;
constexpr int kObsRows = 2;  // of a warp

struct ObsProblem {
  float* weight;        // [rows, width], rows `weight_stride` apart
  float* error;         // [rows, width], rows `error_stride` apart
  bool* mask;           // [rows, width], rows `mask_stride` apart
  const float* factor;  // [width, width], rows `factor_stride` apart
  const int* unusable;  // not 0 if the factor cannot be used
  int64_t rows, width, weight_stride, error_stride, mask_stride, factor_stride;
  int keep_n, group_m;
  int panel;  // columns of a panel: whole groups, at most one column for each lane
};

// A warp's rows in one panel: this lane's column of each.
struct ObsPanel {
  float weight[kObsRows];
  float error[kObsRows];
  uint32_t kept[kObsRows];  // bit l: column of lane l, the same in all lanes
};

// Bit r set where row first + r exists and is finite.
ACE_DEVICE uint32_t usable_rows(const ObsProblem& p, int64_t first) {
  uint32_t usable = 0;
  ACE_UNROLL
  for (int r = 0; r < kObsRows; ++r) {
    if (first + r >= p.rows) break;
    bool finite = true;
    for (int64_t k = lane_id(); k < p.width; k += kWarpSize) {
      finite &= is_finite(p.weight[(first + r) * p.weight_stride + k]);
    }
    usable |= static_cast<uint32_t>(__ballot_sync(kFullWarp, !finite) == 0) << r;
  }
  __syncwarp();  // other lanes will write the weights, and a ballot does not order memory
  return usable;
}

// Applies the corrections of columns [0, start) to column k.
ACE_DEVICE void correct_by_earlier(const ObsProblem& p, int64_t first, uint32_t usable, int64_t start, int64_t k,
                                   bool mine, ObsPanel& panel) {
  for (int64_t before = 0; before < start; before += p.panel) {
    float error[kObsRows];
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      const bool read = (usable >> r & 1u) != 0 && lane_id() < p.panel;  // this lane wrote it
      error[r] = read ? p.error[(first + r) * p.error_stride + before + lane_id()] : 0.0f;
    }
    for (int s = 0; s < p.panel; ++s) {
      const float factor = mine ? p.factor[(before + s) * p.factor_stride + k] : 0.0f;
      ACE_UNROLL
      for (int r = 0; r < kObsRows; ++r) {
        const float d = __shfl_sync(kFullWarp, error[r], s);
        if (d != 0.0f) panel.weight[r] = obs_correct(panel.weight[r], d, factor);
      }
    }
  }
}

}  // namespace ace::cuda
