// Refining a mask by exchanging kept and removed weights.
//
//   refine_swaps_(mask!, weight, gram, keep_n=0, group_m=0, max_swaps=100) -> swaps
//       mask [rows, cols] bool, True where kept; gram [cols, cols] float32, contiguous, symmetric and positive
//       semidefinite (the caller's promise); swaps [rows] int64. Row by row a removed and a kept weight change places
//       while the loss e^T G e of the row's removed weights e falls (core/swaps.h): the removed weight whose return
//       lowers it most goes back, then the kept one that costs least given that goes; the lower column first among
//       equals. keep_n = group_m = 0: any two of the row. Else mask keeps keep_n of each group_m columns (refused
//       otherwise) and the best pair within any group changes places. Ends where no swap lowers the loss by more than
//       float64 rounding may have added, or after max_swaps a row.
//       Column slices of a matrix work for mask and weight. Float operations are done in one order everywhere, so that
//       CUDA gives the CPU's bits. On CUDA swaps is -1 for a row that was refused.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_refine_swaps(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps);

}  // namespace ace
