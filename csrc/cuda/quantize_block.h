// Launchers of ops/quantize_block.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in ops/quantize_block.h.
struct QuantizeArguments {
  float* weight;         // [rows, width]
  float* error;          // [rows, width]
  const bool* mask;      // [rows, width]
  const void* scale;     // [rows]
  const float* factor;   // [width, width]
  const float* current;  // [rows, width] or null
  int64_t rows, width, weight_stride, error_stride, mask_stride, factor_stride, current_stride;
  int bits;
  Dtype dtype;  // of scale
};

size_t quantize_block_bytes();
cudaError_t launch_quantize_block(const QuantizeArguments& arguments, void* workspace, int code, cudaStream_t stream);

}  // namespace ace::cuda
