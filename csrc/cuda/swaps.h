// Launchers of ops/swaps.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in swaps.cuh.
struct SwapArguments {
  const void* weight;
  bool* mask;
  const float* gram;
  int64_t rows, cols, weight_stride, mask_stride, max_swaps;
  int keep_n, group_m;
  Dtype dtype;
};

// swaps [rows]
cudaError_t refine_swaps_bytes(const SwapArguments& arguments, size_t* bytes);
cudaError_t launch_refine_swaps(const SwapArguments& arguments, int64_t* swaps, void* workspace, int code,
                                cudaStream_t stream);

}  // namespace ace::cuda
