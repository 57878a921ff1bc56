// Statistics of activations.
//
//   update_moments_(weight_sum!, mean!, m2!, x, token_weight=None)
//       x [T, d] float32/float16/bfloat16, contiguous columns; token_weight [T] float32, finite and >= 0, or None for
//       1. State: weight_sum [], mean [d], m2 [d], contiguous, all float32 or all float64. Accumulates: merges these T
//       tokens into the state (Chan's rule), so calls may be split anywhere up to rounding. T == 0 changes nothing;
//       with d == 0 only weight_sum changes. On the CPU at most 64 tokens are summed in float32 before they are merged
//       in float64; on CUDA partial states of up to 2048 tokens are float32, merged by Chan's rule. A token of weight 0
//       is not read. NaN or infinity in x makes the state NaN or infinite; an op that gets a column factor computed
//       from that state refuses it.
//   inverse_square_norm(a) -> r
//       a [T, d] as x above -> r [T] float32, r_t = 1 / sum_i a_ti^2 (sum in float32 or wider); a row of zeros gives 0.
//       Below ||a_t||^2 = 3e-39 r is infinite, which update_moments_ refuses as token_weight.
//   update_cosine_moment_(moment!, x, a)
//       x [T, d_in], a [T, d_out] as above (one dtype), moment [d_out, d_in] float32 contiguous. moment += sum_t r_t^2
//       a_ti^2 x_tj^2, r as above, float32 sums. On the CPU the precision follows torch's float32 matmul setting (full
//       float32 by default), and the order of sums may depend on the number of threads, as in torch's products. On CUDA
//       squares are rounded to bfloat16 and multiplied on tensor cores. All terms are >= 0, so two squares rounded to 8
//       bits each change the moment by at most 2^-7 of itself.
#pragma once

#include "ops.h"

namespace ace {

// Shapes, dtypes, strides and devices. Values are not checked: a back end reports values that are not finite while it
// reads.
void check_update_moments(const at::Tensor& weight_sum, const at::Tensor& mean, const at::Tensor& m2,
                          const at::Tensor& x, const OptionalTensor& token_weight);
void check_inverse_square_norm(const at::Tensor& a);
void check_update_cosine_moment(const at::Tensor& moment, const at::Tensor& x, const at::Tensor& a);

}  // namespace ace
