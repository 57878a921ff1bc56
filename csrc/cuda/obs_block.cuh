// obs_block_: SparseGPT's recursion inside one block of columns (core/obs_block.h), one warp for several rows.
//
// Contract
//   weight, error, mask  [rows, width] as in ops.h; with a pattern mask is written, else read.
//   ties                 among equal |w| / U_jj the lower column first.
//   same bits            as the CPU: each weight is corrected by the preceding columns in order.
//   refused              a row with a weight that is not finite is left unchanged, and every row if the factor is not
//                        finite or its diagonal is not positive; the flag is raised.
//
// Method: the panels of obs_panel.cuh. Compiled and run on the host only: not run on a GPU.
#pragma once

#include "cuda/obs_panel.cuh"

namespace ace::cuda {

// Checks only the entries that are read: the diagonal and above.
__global__ void __launch_bounds__(kObsThreads)
    check_factor_kernel(const float* factor, int64_t width, int64_t stride, int* unusable) {
  bool usable = true;
  for (int64_t c = blockIdx.x; c < width; c += gridDim.x) {
    for (int64_t k = c + threadIdx.x; k < width; k += kObsThreads) {
      const float value = factor[c * stride + k];
      usable &= is_finite(value) && (k != c || value > 0.0f);
    }
  }
  if (!usable) atomicMax(unusable, 1);
}

// Decides which lanes of the group that starts at lane s are kept.
ACE_DEVICE void choose_group(const ObsProblem& p, int s, float diagonal, ObsPanel& panel) {
  const int lane = lane_id();
  const bool member = lane >= s && lane < s + p.group_m;
  ACE_UNROLL
  for (int r = 0; r < kObsRows; ++r) {
    const uint32_t key = obs_key(panel.weight[r], diagonal);
    int rank = 0;
    for (int g = s; g < s + p.group_m; ++g) {
      const uint32_t other = __shfl_sync(kFullWarp, key, g);
      rank += g < lane ? other >= key : other > key;
    }
    panel.kept[r] |= __ballot_sync(kFullWarp, member && rank < p.keep_n);
  }
}

// The recursion over the panel's own columns.
ACE_DEVICE void solve_panel(const ObsProblem& p, int64_t start, int64_t k, bool mine, ObsPanel& panel) {
  const float diagonal = mine ? p.factor[k * p.factor_stride + k] : 1.0f;
  const int lane = lane_id(), columns = p.width - start < p.panel ? static_cast<int>(p.width - start) : p.panel;
  for (int s = 0; s < columns; ++s) {
    if (p.group_m > 0 && s % p.group_m == 0) choose_group(p, s, diagonal, panel);
    const bool later = mine && lane > s;
    const float factor = later ? p.factor[(start + s) * p.factor_stride + k] : 0.0f;
    const float pivot = __shfl_sync(kFullWarp, diagonal, s);
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      const bool removed = (panel.kept[r] >> s & 1u) == 0;
      const float weight = __shfl_sync(kFullWarp, panel.weight[r], s);
      const float d = removed ? obs_error(weight, pivot) : 0.0f;
      if (later && d != 0.0f) panel.weight[r] = obs_correct(panel.weight[r], d, factor);
      if (lane == s) {
        panel.error[r] = d;
        panel.weight[r] = removed ? 0.0f : weight;
      }
    }
  }
}

ACE_DEVICE void solve_rows(const ObsProblem& p, int64_t first, uint32_t usable) {
  for (int64_t start = 0; start < p.width; start += p.panel) {
    const int64_t k = start + lane_id();
    const bool mine = lane_id() < p.panel && k < p.width;
    ObsPanel panel = {};
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      const bool read = mine && (usable >> r & 1u) != 0;
      panel.weight[r] = read ? p.weight[(first + r) * p.weight_stride + k] : 0.0f;
      const bool kept = p.group_m == 0 && read && p.mask[(first + r) * p.mask_stride + k];
      panel.kept[r] = __ballot_sync(kFullWarp, kept);
    }
    correct_by_earlier(p, first, usable, start, k, mine, panel);
    solve_panel(p, start, k, mine, panel);
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      if (!mine || (usable >> r & 1u) == 0) continue;
      p.weight[(first + r) * p.weight_stride + k] = panel.weight[r];
      p.error[(first + r) * p.error_stride + k] = panel.error[r];
      if (p.group_m > 0) p.mask[(first + r) * p.mask_stride + k] = (panel.kept[r] >> lane_id() & 1u) != 0;
    }
  }
}

__global__ void __launch_bounds__(kObsThreads) obs_block_kernel(ObsProblem p, NotFinite report) {
  if (*p.unusable != 0) {
    if (threadIdx.x == 0) raise_flag(report);
    return;
  }
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kObsWarps + warp_id()) * kObsRows; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * kObsWarps * kObsRows) {
    const uint32_t usable = usable_rows(p, first);
    const int64_t there = p.rows - first < kObsRows ? p.rows - first : kObsRows;
    if (usable != (1u << there) - 1u) raise_flag(report);
    solve_rows(p, first, usable);
  }
}

}  // namespace ace::cuda
