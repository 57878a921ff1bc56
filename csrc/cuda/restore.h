// Launcher of ops/restore.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in restore.cuh.
struct RestoreArguments {
  float* weight;
  const bool* mask;
  const float* mean;
  const float* direction;
  int64_t rows, cols, weight_stride, mask_stride;
};

cudaError_t launch_restore_mean(const RestoreArguments& arguments, int code, cudaStream_t stream);

}  // namespace ace::cuda
