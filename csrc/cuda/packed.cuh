// packed_linear for up to 16 tokens, and unpack_bitmap: one warp for each row of the packed matrix (ops/packed.h).
//
// Contract
//   sums       of products in float32: lane l of the warp adds columns l, l + 32, ... in ascending order, then lanes
//              are added by halves, then the bias; rounded once.
//   any bits   A bitmap or row_start that disagrees with the survivors gives wrong results; nothing outside the buffers
//              is read or written.
//
// Method: the walk of bitmap_walk.cuh, one word after the other: a lane takes the bit of its own column, counts the
// bits below it, and reads its value; neighbouring lanes read neighbouring values of shared memory and neighbouring
// inputs. Bytes read for a bfloat16 weight at 50 %: 1/8 of bitmap and 1 of values, once; besides these only x, which
// stays in the caches.
//
// Compiled and run on the host only: not run on a GPU.
#pragma once

#include "cuda/bitmap_walk.cuh"
#include "cuda/packed.h"

namespace ace::cuda {

// Calls action(column, stored, value) for this lane's columns, 32 of a chunk at a time, together in all lanes of the
// warp. `value` is T{} where nothing is stored.
template <class T, class Action>
ACE_DEVICE void for_each_column(const PackedRows<T>& of, int64_t row, PackedStage<T>& stage, Action&& action) {
  const uint32_t below = (1u << lane_id()) - 1u;
  for_each_chunk<1>(of, row, stage, [&](int64_t chunk) {
    for (int w = 0; w < kWarpSize && chunk + w * kPackedColumns < of.cols; ++w) {
      const int64_t column = chunk + w * kPackedColumns + lane_id();
      const PackedWord word = stage.word[w];
      const bool stored = (word.bits >> lane_id() & 1u) != 0 && column < of.cols;
      const T value = stored ? stage.value[word.first + __popc(word.bits & below)] : T{};
      action(column, stored, value);
    }
  });
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize)
    packed_linear_kernel(PackedRows<T> of, const T* x, int64_t stride, const T* bias, T* out) {
  __shared__ PackedStage<T> stages[kPackedWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < of.rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    float sums[kTokens];
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[t] = 0.0f;
    for_each_column(of, row, stages[warp_id()], [&](int64_t column, bool stored, T value) {
      if (!stored) return;
      const float weight = to_float(value);
      ACE_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[t] += weight * to_float(x[t * stride + column]);
    });
    ACE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const float sum = warp_sum(sums[t]);
      if (lane_id() == 0) round_to(bias == nullptr ? sum : sum + to_float(bias[row]), &out[t * of.rows + row]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kPackedWarps* kWarpSize) unpack_bitmap_kernel(PackedRows<T> of, T* out) {
  __shared__ PackedStage<T> stages[kPackedWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedWarps + warp_id();
  for (int64_t row = first; row < of.rows; row += static_cast<int64_t>(gridDim.x) * kPackedWarps) {
    for_each_column(of, row, stages[warp_id()], [&](int64_t column, bool, T value) {
      if (column < of.cols) out[row * of.cols + column] = value;
    });
  }
}

}  // namespace ace::cuda
