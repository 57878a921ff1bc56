// Launchers of ops/packed.h.
#pragma once

#include "cuda/arguments.h"

namespace ace::cuda {

// The tensors of the contract in ops/packed.h.
struct PackedArguments {
  const uint8_t* bitmap;     // [rows, 8 words]
  const void* values;        // [survivors]
  const int64_t* row_start;  // or null: row i begins at i * keep
  int64_t rows, cols, words, survivors, keep;
  Dtype dtype;
};

constexpr int64_t kPackedTokens = 16;  // the most tokens of one launch of the product

// out [tokens, rows] = x W^T + bias, for at most kPackedTokens tokens of x [tokens, cols], `stride` values apart; bias
// [rows] or null. All of the matrix's dtype.
cudaError_t launch_packed_linear(const PackedArguments& matrix, const Activations& x, const void* bias, void* out,
                                 cudaStream_t stream);

// out [rows, cols].
cudaError_t launch_unpack_bitmap(const PackedArguments& matrix, void* out, cudaStream_t stream);

}  // namespace ace::cuda
