// quantize_block_: GPTQ's recursion inside one block of columns with a fixed mask (core/quantize_block.h), one warp for
// several rows.
//
// Contract
//   weight, error, mask, scale, current  as in ops/quantize_block.h.
//   same bits  as the CPU: each weight is corrected by the preceding columns in order.
//   refused    a row whose weight, current or scale is not finite, or whose scale is negative, is left unchanged, and
//              every row if the factor is not finite or its diagonal is not positive; the flag is raised.
//
// Method: the panels of obs_panel.cuh. Compiled and run on the host only: not run on a GPU.
#pragma once

#include "core/quantize_block.h"
#include "cuda/obs_panel.cuh"

namespace ace::cuda {

// Blocks of a multiprocessor at a time, so that a thread may take 64 registers. Left to itself, ptxas takes 56, and
// spills.
constexpr int kQuantizeBlocks = 8;

// ObsProblem has the rest; here it has no pattern, and its mask is only read. Two parameters of a kernel, because nvcc
// would take the address of a nested one.
template <class T>
struct QuantizeGrid {
  const T* scale;        // [rows]
  const float* current;  // [rows, width], rows `current_stride` apart, or null
  int64_t current_stride;
  CodeRange range;
};

// Of a warp's rows.
struct QuantizeRows {
  float scale[kObsRows];
  uint32_t usable;  // bit r: row r exists, and nothing forbids it
};

template <class T>
ACE_DEVICE QuantizeRows quantizable_rows(const ObsProblem& p, const QuantizeGrid<T>& grid, int64_t first) {
  QuantizeRows rows = {{}, usable_rows(p, first)};
  ACE_UNROLL
  for (int r = 0; r < kObsRows; ++r) {
    if (first + r >= p.rows) break;
    rows.scale[r] = to_float(grid.scale[first + r]);
    bool fine = is_finite(rows.scale[r]) && rows.scale[r] >= 0.0f;
    if (grid.current != nullptr) {
      for (int64_t k = lane_id(); k < p.width; k += kWarpSize) {
        fine &= is_finite(grid.current[(first + r) * grid.current_stride + k]);
      }
    }
    if (__ballot_sync(kFullWarp, !fine) != 0) rows.usable &= ~(1u << r);
  }
  return rows;
}

// The recursion over the panel's own columns. `current`: this lane's column of each row.
template <class T>
ACE_DEVICE void round_panel(const ObsProblem& p, const QuantizeGrid<T>& grid, const QuantizeRows& rows, int64_t start,
                            int64_t k, bool mine, const float* current, ObsPanel& panel) {
  const float diagonal = mine ? p.factor[k * p.factor_stride + k] : 1.0f;
  const int64_t rest = p.width - start;
  const int lane = lane_id(), columns = rest < p.panel ? static_cast<int>(rest) : p.panel;
  for (int s = 0; s < columns; ++s) {
    const bool later = mine && lane > s;
    const float factor = later ? p.factor[(start + s) * p.factor_stride + k] : 0.0f;
    const float pivot = __shfl_sync(kFullWarp, diagonal, s);
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      const float weight = __shfl_sync(kFullWarp, panel.weight[r], s), before = __shfl_sync(kFullWarp, current[r], s);
      const bool kept = (panel.kept[r] >> s & 1u) != 0;
      const float value = kept ? grid_value<T>(nearest_code(weight, rows.scale[r], grid.range), rows.scale[r]) : 0.0f;
      const float d = obs_error(grid.current == nullptr ? weight - value : value - before, pivot);
      if (later && d != 0.0f) panel.weight[r] = obs_correct(panel.weight[r], d, factor);
      if (lane == s) {
        panel.error[r] = d;
        panel.weight[r] = value;
      }
    }
  }
}

template <class T>
ACE_DEVICE void round_rows(const ObsProblem& p, const QuantizeGrid<T>& grid, int64_t first, const QuantizeRows& rows) {
  for (int64_t start = 0; start < p.width; start += p.panel) {
    const int64_t k = start + lane_id();
    const bool mine = lane_id() < p.panel && k < p.width;
    ObsPanel panel = {};
    float current[kObsRows] = {};
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      const bool read = mine && (rows.usable >> r & 1u) != 0;
      if (read) panel.weight[r] = p.weight[(first + r) * p.weight_stride + k];
      if (read && grid.current != nullptr) current[r] = grid.current[(first + r) * grid.current_stride + k];
      panel.kept[r] = __ballot_sync(kFullWarp, read && p.mask[(first + r) * p.mask_stride + k]);
    }
    correct_by_earlier(p, first, rows.usable, start, k, mine, panel);
    round_panel(p, grid, rows, start, k, mine, current, panel);
    ACE_UNROLL
    for (int r = 0; r < kObsRows; ++r) {
      if (!mine || (rows.usable >> r & 1u) == 0) continue;
      p.weight[(first + r) * p.weight_stride + k] = panel.weight[r];
      p.error[(first + r) * p.error_stride + k] = panel.error[r];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kObsThreads, kQuantizeBlocks)
    quantize_block_kernel(ObsProblem p, QuantizeGrid<T> grid, NotFinite report) {
  if (*p.unusable != 0) {
    if (threadIdx.x == 0) raise_flag(report);
    return;
  }
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kObsWarps + warp_id()) * kObsRows; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * kObsWarps * kObsRows) {
    const QuantizeRows rows = quantizable_rows(p, grid, first);
    const int64_t there = p.rows - first < kObsRows ? p.rows - first : kObsRows;
    if (rows.usable != (1u << there) - 1u) raise_flag(report);
    round_rows(p, grid, first, rows);
  }
}

}  // namespace ace::cuda
