// Launchers of ops/quantized.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in ops/quantized.h.
struct QuantizedArguments {
  const uint8_t* bitmap;     // [rows, 8 words]
  const uint8_t* codes;      // [bytes]
  const int64_t* row_start;  // or null: row i begins at byte i * keep
  const void* scales;        // [rows, ceil(cols / group)]
  int64_t rows, cols, words, bytes, keep;
  int64_t group;
  int bits;     // 8 or 4
  Dtype dtype;  // of scales
};

constexpr int64_t kQuantizedTokens = 16;  // the most tokens of one launch of the product

// out [tokens, rows] = x W^T + bias, for at most kQuantizedTokens tokens of x [tokens, cols], `stride` values apart;
// bias [rows] or null. All of the dtype of scales.
cudaError_t launch_quantized_linear(const QuantizedArguments& matrix, const Activations& x, const void* bias, void* out,
                                    cudaStream_t stream);

// out [rows, cols] in the dtype of scales.
cudaError_t launch_unpack_quantized(const QuantizedArguments& matrix, void* out, cudaStream_t stream);

}  // namespace ace::cuda
