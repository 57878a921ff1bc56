// SparseGPT's recursion inside one block of columns (core/obs_block.h; arXiv 2301.00774).
//
//   obs_block_(weight!, error!, mask!, factor, keep_n=0, group_m=0)
//       weight, error [rows, width] float32, mask [rows, width] bool, factor U [width, width] float32 with a positive
//       diagonal; entries below the diagonal are not read. Column slices of a matrix work for every tensor. For c =
//       0..width-1: where mask is false d = w_c / U_cc, w_k -= d U_ck for k > c, w_c = +0.0; else d = 0 and w_c stays;
//       error_c = d. keep_n = group_m = 0: mask is read. Else it is written: at the first column of each group of
//       group_m the keep_n largest |w_j| / U_jj are kept, the lower column first among equals. An overflow in the
//       recursion is not refused here: its results are not finite, so the next op refuses them. Float operations are
//       done in one order everywhere, so that CUDA gives the CPU's bits.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_obs_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                     const at::Tensor& factor, int64_t keep_n, int64_t group_m);

}  // namespace ace
