// GPTQ's recursion inside one block of columns with a fixed mask (core/quantize_block.h; arXiv 2210.17323).
//
//   quantize_block_(weight!, error!, mask, scale, factor, bits, current=None)
//       weight, error [rows, width] float32, mask [rows, width] bool, scale [rows] float32, float16 or bfloat16, finite
//       and not negative, contiguous; factor U [width, width] float32 with a positive diagonal; entries below the
//       diagonal are not read. Column slices of a matrix work for weight, error, mask, factor and current. For c =
//       0..width-1: q = w_c / scale rounded to a whole number from -2^(bits-1) to 2^(bits-1) - 1, ties to even, and 0
//       where mask is false or scale is 0; v = q scale, multiplied in float32 and rounded to the dtype of scale;
//       d = (w_c - v) / U_cc, w_k -= d U_ck for k > c, w_c = v; error_c = d. bits is from 2 to 8.
//       With current [rows, width] float32, d = (v - current_c) / U_cc: the step of a coordinate descent from current,
//       whose targets are in weight.
//       An overflow in the recursion is not refused here: its results are not finite, so the next op refuses them.
//       Float operations are done in one order everywhere, so that CUDA gives the CPU's bits.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_quantize_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                          const at::Tensor& scale, const at::Tensor& factor, int64_t bits,
                          const OptionalTensor& current);

}  // namespace ace
