// Block-wide operations. All threads must call them. Every thread gets the result, and the scratch may be reused after
// the next barrier.
#pragma once

#include "core/radix_select.h"
#include "cuda/vector.cuh"

namespace ace::cuda {

struct BlockScratch {
  int64_t warp_sum[kWarpSize];
  uint32_t warp_count[kWarpSize];
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

ACE_DEVICE int64_t* warp_sums(BlockScratch& scratch, int64_t) { return scratch.warp_sum; }
ACE_DEVICE uint32_t* warp_sums(BlockScratch& scratch, uint32_t) { return scratch.warp_count; }

// Sum over the threads before this one; *total is the sum over all. blockDim.x is a multiple of 32.
template <class Sum>
ACE_DEVICE Sum exclusive_scan(Sum value, BlockScratch& scratch, Sum* total) {
  Sum inclusive = value;
  ACE_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const Sum before = __shfl_up_sync(kFullWarp, inclusive, static_cast<unsigned>(distance));
    if (lane_id() >= distance) inclusive += before;
  }
  Sum* const sums = warp_sums(scratch, Sum{});
  if (lane_id() == kWarpSize - 1) sums[warp_id()] = inclusive;
  __syncthreads();
  Sum before = 0, all = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) {
    if (w == warp_id()) before = all;
    all += sums[w];
  }
  *total = all;
  return before + inclusive - value;
}

// find_bin (core/radix_select.h) by a whole block: each thread sums a stretch of bins, the scan runs from the highest.
// `bins` is a power of two, and counts are 16-byte aligned. The caller puts a barrier between the last write of
// `counts` and this call. Sums have the width of the counts.
template <class Count>
ACE_DEVICE RadixBin find_bin_block(const Count* counts, int bins, int64_t want, BlockScratch& scratch) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int each = bins > threads ? bins / threads : 1;
  const int first = bins - (thread + 1) * each;  // this thread's lowest bin; negative: none
  const bool by_fours = sizeof(Count) == sizeof(uint32_t) && each % 4 == 0;
  const auto sum_of_four = [&](int b) {
    uint32_t four[4];
    load_line(counts + b, four);
    return static_cast<Count>(four[0] + four[1] + four[2] + four[3]);
  };
  Count sum = 0;
  if (by_fours) {
    for (int b = first; b < first + each; b += 4) sum += sum_of_four(b);
  } else if (first >= 0) {
    for (int b = first; b < first + each; ++b) sum += counts[b];
  }
  Count total = 0;
  Count above = exclusive_scan(sum, scratch, &total);
  const Count wanted = static_cast<Count>(want);
  if (above < wanted && wanted <= above + sum) {
    int bin = first + each - 1;
    if (by_fours) {
      for (Count four; above + (four = sum_of_four(bin - 3)) < wanted; bin -= 4) above += four;
    }
    while (above + counts[bin] < wanted) above += counts[bin--];
    scratch.found = {static_cast<uint32_t>(bin), static_cast<int64_t>(above), static_cast<int64_t>(counts[bin])};
  }
  __syncthreads();
  return scratch.found;
}

struct alignas(16) RadixCounts {
  uint32_t bin[kRadixBins];
};

// Zeroes 16-byte aligned counts, `bins` a multiple of four; ends with a barrier.
ACE_DEVICE void clear_bins(uint32_t* counts, int bins) {
  constexpr uint32_t kZeros[4] = {};
  for (int b = 4 * static_cast<int>(threadIdx.x); b < bins; b += 4 * static_cast<int>(blockDim.x)) {
    store_shared_line(counts + b, kZeros);
  }
  __syncthreads();
}

}  // namespace ace::cuda
