// Exchanges kept and removed weights so that the removed ones shift a row's mean output less.
//
//   balance_mean_(mask!, weight, variance, mean, group_m=0, rounds=1) -> swaps
//       mask [rows, cols] bool, True where kept; variance [cols] (not negative) and mean [cols] float32, contiguous, of
//       the inputs; swaps [rows] int64. A row's removed weights cost sum w_j^2 variance_j + (sum w_j mean_j)^2: the
//       squared change of the row's output if columns are uncorrelated. Removed and kept weights are exchanged while
//       that cost falls; a row keeps as many as before. group_m = 0: any two of the row; else (1 to 32, a divisor of
//       cols) two of the same group_m columns, which preserves an N:M pattern. A round scans the row once for
//       candidates, in float32 at the row's present shift s = sum over the removed of w_j mean_j: column j belongs to
//       lane j % 32, and each lane offers the removed weight whose restoration, and the kept weight whose removal,
//       lowers the cost most by itself. Then, in float64, the best removed weight is restored and the kept weight that
//       then costs least is removed, until the best exchange no longer gains. Each candidate is used once. With groups,
//       group g belongs to lane g % 32, each lane offers the best pair of a group (its best restoration and its best
//       removal, whose changes are added), and the best pair of all is swapped. Lower columns first among equals. A row
//       ends with a round that swaps nothing, or after `rounds` (not negative). Each swap certainly lowers the cost: by
//       more than the bound on float64 rounding (core/balance.h). Column slices of a matrix work for mask and weight.
//       Float operations are done in one order everywhere, so that CUDA gives the CPU's bits. On CUDA swaps is -1 for a
//       refused row: the row, variance or mean has a value that is not finite, or a variance is negative.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_balance_mean(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& variance,
                        const at::Tensor& mean, int64_t group_m, int64_t rounds);

}  // namespace ace
