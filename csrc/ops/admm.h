// The elementwise half of an iteration of ADMM (arXiv 2401.02938), in two passes around a matrix product.
//
//   admm_change_(change!, weight, mask, dense, norm)
//       change_ij = (w_ij where mask_ij, -w_ij elsewhere) - dense_ij norm_j
//   admm_update_(weight!, product, mask, dense, norm, dual_scale)
//       w_ij = product_ij + dense_ij norm_j + (0 where mask_ij, dual_scale w_ij elsewhere)
//
// weight and dense are [rows, cols] float32, mask [rows, cols] bool, norm [cols] float32, contiguous; change and
// product [rows, cols] float32 or bfloat16. Each product, sum and difference is rounded to float32, from left to right;
// bfloat16 is rounded to nearest. NaN and infinity go through. Column slices of a matrix work. On the CPU only: on CUDA
// callers use torch's operations (not run on a GPU).
#pragma once

#include "ops.h"

namespace ace {

void check_admm_change(const at::Tensor& change, const at::Tensor& weight, const at::Tensor& mask,
                       const at::Tensor& dense, const at::Tensor& norm);

void check_admm_update(const at::Tensor& weight, const at::Tensor& product, const at::Tensor& mask,
                       const at::Tensor& dense, const at::Tensor& norm);

}  // namespace ace
