// Launchers of ops/quantize_block.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in quantize_block.cuh.
struct QuantizeArguments {
  float* weight;         // [rows, width], rows `weight_stride` apart
  float* error;          // [rows, width]
  const bool* mask;      // [rows, width]
  const void* scale;     // [rows] of `dtype`
  const float* factor;   // [width, width]
  const float* current;  // [rows, width]; null: none
  int64_t rows, width, weight_stride, error_stride, mask_stride, factor_stride, current_stride;
  Dtype dtype;
  int bits;
};

size_t quantize_block_bytes();
cudaError_t launch_quantize_block(const QuantizeArguments& arguments, void* workspace, int code, cudaStream_t stream);

}  // namespace ace::cuda
