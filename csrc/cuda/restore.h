// Launcher of ops/restore.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// What the contract in restore.cuh names.
struct RestoreArguments {
  float* weight;
  const bool* mask;
  const float* mean;
  const float* direction;
  int64_t rows, cols, weight_stride, mask_stride;
};

cudaError_t launch_restore_mean(const RestoreArguments& arguments, int code, cudaStream_t stream);

}  // namespace ace::cuda
