// Updates remaining weights to compensate for the removed ones' share of a row's mean output.
//
//   restore_mean_(weight!, mask, mean, direction)
//       weight [rows, cols] float32; mask [rows, cols] bool, True where kept; mean [cols] and direction [cols] float32,
//       contiguous, with mean_j direction_j >= 0. Row by row, with s the sum over the removed of w_j mean_j:
//           w_j = w_j + s direction_j / (1 + sum over the kept of mean_j direction_j) where kept, +0.0 where removed.
//       With direction_j = mean_j / variance_j this minimises, over all changes of the kept weights, the sum of
//       variance_j (change of w_j)^2 plus (change of the row's mean output)^2 (by the Sherman-Morrison inverse of
//       diag(variance) + mean mean^T, 1950). Sums in float64, in lanes (core/lanes.h); the new weight is rounded to
//       float32 once. A result beyond float32 is written as infinity. Column slices of a matrix work for mask and
//       weight; CUDA gives the CPU's bits. On CUDA a refused row is left unchanged: it, mean or direction has a value
//       that is not finite, or a product is negative.
#pragma once

#include "ops.h"

namespace ace {

void check_restore_mean(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& mean,
                        const at::Tensor& direction);

}  // namespace ace
