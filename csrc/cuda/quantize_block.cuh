// quantize_block_: GPTQ's recursion inside one block of columns (core/quantize_block.h), one warp for several rows.
//
// Contract
//   weight, error  [rows, width], rewritten; mask, scale, factor, current as in ops/quantize_block.h.
//   same bits      as the CPU: each weight is corrected by the preceding columns in order.
//   refused        a row is left unchanged if its weight, current or scale is not finite or its scale is negative, and
//                  every row if the factor is not finite or its diagonal is not positive; the flag is raised.
//
// Method: as obs_block.cuh. Columns are handled in panels of 32, one lane for each column. A panel first applies the
// corrections of the preceding panels, whose errors the lanes read back and broadcast; then its own columns one after
// another, by shuffles. No barrier and no shared memory. Compiled and run on the host only: not run on a GPU.
#pragma once

#include "core/obs_block.h"
#include "core/quantize_block.h"
#include "cuda/block.cuh"
#include "cuda/quantize_block.h"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kQuantizeThreads = 128;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpSize;
constexpr int kQuantizeRows = 2;  // of a warp

// A warp's rows in one panel: this lane's column of each.
struct QuantizePanel {
  float weight[kQuantizeRows];
  float current[kQuantizeRows];
  float error[kQuantizeRows];
  bool kept[kQuantizeRows];
};

// Checks only the entries that are read: the diagonal and above.
__global__ void __launch_bounds__(kQuantizeThreads)
    check_quantize_factor_kernel(const float* factor, int64_t width, int64_t stride, int* unusable) {
  bool usable = true;
  for (int64_t c = blockIdx.x; c < width; c += gridDim.x) {
    for (int64_t k = c + threadIdx.x; k < width; k += kQuantizeThreads) {
      const float value = factor[c * stride + k];
      usable &= is_finite(value) && (k != c || value > 0.0f);
    }
  }
  if (!usable) atomicMax(unusable, 1);
}

template <class T>
ACE_DEVICE float scale_of(const QuantizeArguments& p, int64_t i) {
  return to_float(static_cast<const T*>(p.scale)[i]);
}

// Bit r set where row first + r exists and can be rounded.
template <class T>
ACE_DEVICE uint32_t usable_rows(const QuantizeArguments& p, int64_t first) {
  uint32_t usable = 0;
  ACE_UNROLL
  for (int r = 0; r < kQuantizeRows; ++r) {
    const int64_t i = first + r;
    if (i >= p.rows) break;
    const float scale = scale_of<T>(p, i);
    bool good = is_finite(scale) && scale >= 0.0f;
    for (int64_t k = lane_id(); k < p.width; k += kWarpSize) {
      good &= is_finite(p.weight[i * p.weight_stride + k]);
      if (p.current != nullptr) good &= is_finite(p.current[i * p.current_stride + k]);
    }
    usable |= static_cast<uint32_t>(__ballot_sync(kFullWarp, !good) == 0) << r;
  }
  __syncwarp();  // other lanes will write the weights, and a ballot does not order memory
  return usable;
}

// Applies the corrections of columns [0, start) to column k.
ACE_DEVICE void correct_by_earlier(const QuantizeArguments& p, int64_t first, uint32_t usable, int64_t start, int64_t k,
                                   bool mine, QuantizePanel& panel) {
  for (int64_t before = 0; before < start; before += kWarpSize) {
    float error[kQuantizeRows];
    ACE_UNROLL
    for (int r = 0; r < kQuantizeRows; ++r) {
      const bool read = (usable >> r & 1u) != 0;  // this lane wrote it
      error[r] = read ? p.error[(first + r) * p.error_stride + before + lane_id()] : 0.0f;
    }
    for (int s = 0; s < kWarpSize; ++s) {
      const float factor = mine ? p.factor[(before + s) * p.factor_stride + k] : 0.0f;
      ACE_UNROLL
      for (int r = 0; r < kQuantizeRows; ++r) {
        const float d = __shfl_sync(kFullWarp, error[r], s);
        if (d != 0.0f) panel.weight[r] = obs_correct(panel.weight[r], d, factor);
      }
    }
  }
}

// The recursion over the panel's own columns.
template <class T>
ACE_DEVICE void round_panel(const QuantizeArguments& p, const float (&scale)[kQuantizeRows], CodeRange range,
                            int64_t start, int64_t k, bool mine, QuantizePanel& panel) {
  const float diagonal = mine ? p.factor[k * p.factor_stride + k] : 1.0f;
  const int lane = lane_id(), columns = p.width - start < kWarpSize ? static_cast<int>(p.width - start) : kWarpSize;
  for (int s = 0; s < columns; ++s) {
    const bool later = mine && lane > s;
    const float factor = later ? p.factor[(start + s) * p.factor_stride + k] : 0.0f;
    ACE_UNROLL
    for (int r = 0; r < kQuantizeRows; ++r) {
      if (lane == s) {
        const float weight = panel.weight[r];
        const float value = panel.kept[r] ? grid_value<T>(nearest_code(weight, scale[r], range), scale[r]) : 0.0f;
        panel.error[r] = obs_error(p.current == nullptr ? weight - value : value - panel.current[r], diagonal);
        panel.weight[r] = value;
      }
      const float d = __shfl_sync(kFullWarp, panel.error[r], s);
      if (later && d != 0.0f) panel.weight[r] = obs_correct(panel.weight[r], d, factor);
    }
  }
}

template <class T>
ACE_DEVICE void round_rows(const QuantizeArguments& p, int64_t first, uint32_t usable, CodeRange range) {
  float scale[kQuantizeRows];
  ACE_UNROLL
  for (int r = 0; r < kQuantizeRows; ++r) scale[r] = (usable >> r & 1u) != 0 ? scale_of<T>(p, first + r) : 0.0f;
  for (int64_t start = 0; start < p.width; start += kWarpSize) {
    const int64_t k = start + lane_id();
    const bool mine = k < p.width;
    QuantizePanel panel = {};
    ACE_UNROLL
    for (int r = 0; r < kQuantizeRows; ++r) {
      if (!mine || (usable >> r & 1u) == 0) continue;
      panel.weight[r] = p.weight[(first + r) * p.weight_stride + k];
      panel.kept[r] = p.mask[(first + r) * p.mask_stride + k];
      if (p.current != nullptr) panel.current[r] = p.current[(first + r) * p.current_stride + k];
    }
    correct_by_earlier(p, first, usable, start, k, mine, panel);
    round_panel<T>(p, scale, range, start, k, mine, panel);
    ACE_UNROLL
    for (int r = 0; r < kQuantizeRows; ++r) {
      if (!mine || (usable >> r & 1u) == 0) continue;
      p.weight[(first + r) * p.weight_stride + k] = panel.weight[r];
      p.error[(first + r) * p.error_stride + k] = panel.error[r];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_block_kernel(QuantizeArguments p, const int* unusable, NotFinite report) {
  if (*unusable != 0) {
    if (threadIdx.x == 0) raise_flag(report);
    return;
  }
  const CodeRange range(p.bits);
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + warp_id()) * kQuantizeRows; first < p.rows;
       first += static_cast<int64_t>(gridDim.x) * kQuantizeWarps * kQuantizeRows) {
    const uint32_t usable = usable_rows<T>(p, first);
    const int64_t there = p.rows - first < kQuantizeRows ? p.rows - first : kQuantizeRows;
    if (usable != (1u << there) - 1u) raise_flag(report);
    round_rows<T>(p, first, usable, range);
  }
}

}  // namespace ace::cuda
