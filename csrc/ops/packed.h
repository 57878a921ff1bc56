// Packed matrices, whose zeros are not stored: one bit for each weight, and the survivors in order. docs/formats.md
// describes the files.
//
//   packed_linear(x, bitmap, values, row_start=None, bias=None) -> out
//       out [tokens, rows] = x W^T + bias, contiguous, in the dtype of x.
//   unpack_bitmap(bitmap, values, row_start, cols) -> weight
//       weight [rows, cols] contiguous, in the dtype of values: survivors with their bits, +0.0 elsewhere.
//
//   x          [tokens, cols] float32, float16 or bfloat16; contiguous columns, any row stride >= cols.
//   bitmap     [rows, 8 ceil(cols / 64)] uint8, contiguous. Bit j % 8 (the lowest first) of byte j / 8 is column j:
//              set where W_ij is stored. Bits of columns >= cols are 0.
//   values     in the dtype of x, contiguous: the survivors, row after row, each row in column order. [rows, k] if
//              every row has k of them; else [survivors].
//   row_start  [rows + 1] int64, contiguous: row i has values[row_start[i]] to before values[row_start[i + 1]]. Needed
//              if values has one dimension, else refused.
//   bias       [rows] of the dtype of x, contiguous, or None.
//   accuracy   Products are summed in float32, in an order that depends on the processor and on the number of tokens;
//              then the bias is added and the sum is rounded once. Therefore
//                |out - exact| <= u |exact| + (cols + 8) 2^-24 (sum_j |x_j W_ij| + |bias|)
//              with u the rounding unit of the dtype of x (2^-24, 2^-11, 2^-8), as long as nothing over- or underflows:
//              bfloat16 numbers below 2^-126 may count as 0. With many tokens (cpu/packed.cpp), except of bfloat16 with
//              AVX-512's bf16 instructions (with AMX up to 512 tokens), rows are unpacked a panel at a time and torch
//              multiplies, in float32 where its products of half precision are slow: then its accuracy and its use of
//              threads hold. Five and more bfloat16 tokens with these instructions and without AMX are summed in the
//              order of oneDNN 3.12 (cpu/packed_panel.h): finite results have the bits of torch's dense product.
//   not finite Not checked. With an x that is not finite, a zero of W may give NaN or nothing.
//   counts     Whether the bits agree with k or row_start is checked when a file is read (ace_ext.packed), not here,
//              where it would cost a pass over the bitmap in each call. If they disagree, results are wrong, but
//              nothing outside the tensors is read.
//   devices    CPU, CUDA (not run on a GPU) and Meta.
#pragma once

#include "ops.h"

namespace ace {

// Parts of the checks, which ops/quantized.h shares. Each raises ValueError for shapes, dtypes and strides that the
// contract does not allow.
//
// On Meta the number of tokens may be symbolic, and no check may make it a constant: a graph of torch.compile serves
// every number of tokens. Therefore x's strides are not checked there.
void check_tokens(std::string_view op, const at::Tensor& x);
void check_bitmap(std::string_view op, const at::Tensor& bitmap, int64_t cols);
void check_survivors(std::string_view op, std::string_view argument, const at::Tensor& survivors,
                     const at::Tensor& bitmap, const OptionalTensor& row_start);
int64_t columns_of(const at::Tensor& x);  // x.size(1)

void check_packed(std::string_view op, const at::Tensor& bitmap, const at::Tensor& values,
                  const OptionalTensor& row_start, int64_t cols);
void check_packed_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                         const OptionalTensor& row_start, const OptionalTensor& bias);

}  // namespace ace
