// Launcher of ops/balance.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in balance.cuh.
struct BalanceArguments {
  const void* weight;
  bool* mask;
  const float* variance;
  const float* mean;
  int64_t rows, cols, weight_stride, mask_stride, rounds;
  int group_m;
  Dtype dtype;
};

// swaps [rows]
cudaError_t launch_balance_mean(const BalanceArguments& arguments, int64_t* swaps, int code, cudaStream_t stream);

}  // namespace ace::cuda
