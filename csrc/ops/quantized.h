// Packed matrices of quantized survivors: one bit for each weight, the survivors' codes in order, and a scale for each
// row and group of columns. docs/formats.md describes the files.
//
//   quantized_linear(x, bitmap, codes, scales, bits, group, row_start=None, bias=None) -> out
//       out [tokens, rows] = x W^T + bias, contiguous, in the dtype of x, where W_ij = q_ij scales[i, j / group]: not
//       rounded to the dtype of scales, in contrast to unpack_quantized.
//   unpack_quantized(bitmap, codes, scales, bits, group, row_start, cols) -> weight
//       weight [rows, cols] contiguous, in the dtype of scales: float32(q) * float32(scale), rounded to that dtype, for
//       survivors; +0.0 elsewhere, and where q is 0.
//
//   x          [tokens, cols] float32, float16 or bfloat16; contiguous columns, any row stride >= cols.
//   bitmap     [rows, 8 ceil(cols / 64)] uint8, contiguous, as in ops/packed.h.
//   bits       8 or 4: the size of a code.
//   codes      uint8, contiguous: the survivors' codes q, row after row, each row in column order, two's complement. 8
//              bits: a byte each. 4 bits: two in a byte, the lower half first; each row begins with a byte, and an
//              unused upper half is 0. [rows, bytes] if every row has equally many survivors; else [bytes].
//   group      columns that share a scale: a multiple of 64, from 64 to 2^48. A row's last group may be shorter.
//   scales     [rows, ceil(cols / group)] in the dtype of x, contiguous.
//   row_start  [rows + 1] int64, contiguous, in bytes: row i has codes[row_start[i]] to before codes[row_start[i + 1]].
//              Needed if codes has one dimension, else refused.
//   bias       [rows] of the dtype of x, contiguous, or None.
//   accuracy   q and scales are used exactly. Products are summed in float32, in an order that depends on the processor
//              and on the number of tokens; then the bias is added and the sum is rounded once. Therefore, with
//              G = ceil(cols / group) and W as above,
//                |out - exact| <= u |exact| + (cols + G + 8) 2^-24 (sum_j |x_j W_ij| + |bias|) + sum_j d_j |W_ij|
//              with u the rounding unit of the dtype of x (2^-24, 2^-11, 2^-8) and d_j the rounding of x_j, which is 0
//              with one exception: up to 16 tokens of float16 or bfloat16 on a processor with AVX2 and without AVX-512,
//              or with AVX-512's VBMI2 and VNNI. These are cut into spans of 128 columns, or of 64 if group is not a
//              multiple of 128. In a span, x_j is rounded to a multiple of 2^e, with e the least from -126 on for which
//              max |x| <= 32639 2^e; then
//                d_j <= 2^(e - 1) <= max(max |x| / 32639, 2^-127)
//              and bfloat16 numbers of at least 1/64 of the largest are exact.
//              The bound holds as long as nothing over- or underflows:
//              bfloat16 numbers below 2^-126 may count as 0, and inner sums may be 2^24 times as large as W suggests,
//              so that inputs from 2^90 on may overflow.
//              On CUDA, more than 16 tokens are multiplied by torch with the weights of unpack_quantized, which are
//              rounded to the dtype of scales: the bound holds for the product with these.
//   not finite Not checked. With an x or a scale that is not finite, a zero of W may give NaN or nothing, and where
//              x_j is rounded, an infinite x_j gives NaN.
//   counts     Whether the bits agree with the size of codes or with row_start is checked when a file is read
//              (ace_ext.packed), not here. If they disagree, results are wrong, but nothing outside the tensors is
//              read.
//   devices    CPU, CUDA (not run on a GPU) and Meta. On Meta the number of tokens may be symbolic.
#pragma once

#include "ops.h"

namespace ace {

// Raise ValueError for arguments that the contract does not allow.
void check_quantized(std::string_view op, const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                     int64_t bits, int64_t group, const OptionalTensor& row_start, int64_t cols);
void check_quantized_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                            const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                            const OptionalTensor& bias);

}  // namespace ace
