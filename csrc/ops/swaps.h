// Refines a mask by exchanging kept and removed weights.
//
//   refine_swaps_(mask!, weight, gram, keep_n=0, group_m=0, max_swaps=100) -> swaps
//       mask [rows, cols] bool, True where kept; gram [cols, cols] float32, contiguous, symmetric and positive
//       semidefinite (not checked); swaps [rows] int64. Row by row, removed and kept weights are exchanged while the
//       loss e^T G e of the row's removed weights e falls (core/swaps.h): the removed weight whose restoration lowers
//       the loss most is restored, then the kept weight that then costs least is removed; the lower column first among
//       equals. keep_n = group_m = 0: any two of the row. Else mask keeps keep_n of each group_m columns (refused
//       otherwise) and the best pair within any group is exchanged. A row ends when no swap lowers the loss by more
//       than the bound on float64 rounding, or after max_swaps. Column slices of a matrix work for mask and weight.
//       Float operations are done in one order everywhere, so that CUDA gives the CPU's bits. On CUDA swaps is -1 for a
//       refused row.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_refine_swaps(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps);

}  // namespace ace
