// What the threads of a block do together. All threads must call; each function ends with every thread holding the
// result, and its scratch may be used again after the next barrier.
#pragma once

#include "core/radix_select.h"
#include "cuda/platform.cuh"

namespace ace::cuda {

struct BlockScratch {
  int64_t warp_sum[kWarpSize];
  RadixBin found;
};

ACE_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }

ACE_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The same sum in every lane, added in one fixed order.
template <class Real>
ACE_DEVICE Real warp_sum(Real value) {
  ACE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// Sum over the threads before this one; *total is that over all. blockDim.x is a multiple of 32.
ACE_DEVICE int64_t exclusive_scan(int64_t value, BlockScratch& scratch, int64_t* total) {
  int64_t inclusive = value;
  ACE_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t before = __shfl_up_sync(kFullWarp, inclusive, static_cast<unsigned>(distance));
    if (lane_id() >= distance) inclusive += before;
  }
  if (lane_id() == kWarpSize - 1) scratch.warp_sum[warp_id()] = inclusive;
  __syncthreads();
  int64_t before = 0, all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) {
    if (w == warp_id()) before = all;
    all += scratch.warp_sum[w];
  }
  *total = all;
  return before + inclusive - value;
}

// find_bin (core/radix_select.h) by a whole block: each thread sums a stretch of bins, the scan runs from the highest.
// `bins` is a power of two. The caller puts a barrier between the last write of `counts` and this.
template <class Count>
ACE_DEVICE RadixBin find_bin_block(const Count* counts, int bins, int64_t want, BlockScratch& scratch) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int each = bins > threads ? bins / threads : 1;
  const int top =
      bins - 1 - thread * each;  // this thread's highest bin; below 0 where there are more threads than bins
  int64_t sum = 0;
  if (top >= 0) {
    for (int b = 0; b < each; ++b) sum += static_cast<int64_t>(counts[top - b]);
  }
  int64_t total = 0;
  const int64_t above = exclusive_scan(sum, scratch, &total);
  if (above < want && want <= above + sum) {
    const RadixBin found = find_bin(counts + (top - each + 1), each, want - above);
    scratch.found = {found.bin + static_cast<uint32_t>(top - each + 1), found.above + above, found.count};
  }
  __syncthreads();
  return scratch.found;
}

}  // namespace ace::cuda
