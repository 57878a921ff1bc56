// How kernels of packed matrices are launched: a warp for each row, and tokens in blocks. Host code.
#pragma once

#include <type_traits>

#include "cuda/bitmap_walk.cuh"
#include "cuda/launch.cuh"

namespace ace::cuda {

inline cudaError_t packed_grid(int64_t rows, cudaStream_t stream, Launch* at) {
  constexpr int64_t kWaves = 16;
  *at = {0, kPackedWarps * kWarpSize, 0, stream};
  return blocks_for((rows + kPackedWarps - 1) / kPackedWarps, kWaves, &at->blocks);
}

// Calls action(count, first) for blocks of 16, 8, 4, 2 and 1 tokens, the largest first; `count` is an integral_constant
// and `first` the first token of a block.
template <class Action>
cudaError_t in_token_blocks(int64_t tokens, Action&& action) {
  int64_t first = 0;
  const auto some = [&](auto count) {
    for (; first + count <= tokens; first += count) ACE_RETURN_IF_ERROR(action(count, first));
    return cudaSuccess;
  };
  ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 16>{}));
  ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 8>{}));
  ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 4>{}));
  ACE_RETURN_IF_ERROR(some(std::integral_constant<int, 2>{}));
  return some(std::integral_constant<int, 1>{});
}

}  // namespace ace::cuda
