// Launchers of ops/obs_block.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in obs_block.cuh.
struct ObsArguments {
  float* weight;
  float* error;
  bool* mask;
  const float* factor;
  int64_t rows, width, weight_stride, error_stride, mask_stride, factor_stride;
  int keep_n, group_m;
};

// *unusable becomes 1 if the upper triangle of factor [width, width] has a value that is not finite, or its diagonal
// one that is not positive; else 0.
cudaError_t launch_check_factor(const float* factor, int64_t width, int64_t stride, int* unusable, cudaStream_t stream);

size_t obs_block_bytes();
cudaError_t launch_obs_block(const ObsArguments& arguments, void* workspace, int code, cudaStream_t stream);

}  // namespace ace::cuda
