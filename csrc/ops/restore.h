// Remaining weights that take over what the removed ones gave a row's output on average.
//
//   restore_mean_(weight!, mask, mean, direction)
//       weight [rows, cols] float32; mask [rows, cols] bool, True where kept; mean [cols] and direction [cols] float32,
//       contiguous, with mean_j direction_j >= 0. Row by row, with s the sum over the removed of w_j mean_j:
//           w_j = w_j + s direction_j / (1 + sum over the kept of mean_j direction_j) where kept, +0.0 where removed.
//       With direction_j = mean_j / variance_j this makes, over all changes of the kept weights, the sum of variance_j
//       (change of w_j)^2 plus (change of the row's mean output)^2 smallest (the inverse of diag(variance) + mean
//       mean^T by Sherman and Morrison, 1950). Sums in float64, in lanes (core/lanes.h); the new weight is rounded to
//       float32 once. A result beyond float32 is written as infinity. Column slices of a matrix work for mask and
//       weight; CUDA gives the CPU's bits. On CUDA a row that is refused is left as it was: it holds or meets what is
//       not finite, or a product below 0.
#pragma once

#include "ops.h"

namespace ace {

void check_restore_mean(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& mean,
                        const at::Tensor& direction);

}  // namespace ace
