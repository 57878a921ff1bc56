// The change of a row's loss e^T G e when a kept and a removed weight are exchanged. e holds the removed weights (0
// where kept), and G [cols, cols] is the inputs' Gram matrix. With c = G e, moving e_j by `step` changes the loss by 2
// step c_j + step^2 G_jj. All in float64, where a product of two float32 values is exact, so back ends that add in the
// same order find the same swaps.
#pragma once

#include <cmath>

#include "core/lanes.h"
#include "core/scalar.h"

namespace ace {

// step = -w_j restores weight j, step = w_i removes weight i. To remove i after j was restored, pass c_i - w_j G_ij as
// `c`.
ACE_HD double loss_change(double step, double c, double diagonal) { return step * step * diagonal + 2.0 * step * c; }

ACE_HD double diagonal_root(double diagonal) { return sqrt(fabs(diagonal)); }

// |w_j| sqrt(G_jj): the norm of what the weight adds to the row's output.
ACE_HD double output_norm(double weight, double root) { return fabs(weight) * root; }

// The norms of a row are added in partial sums: column j in lane j % kNormLanes.
constexpr int kNormLanes = 256;

// The total of these, in the order of a block reduction: 32 lanes by halves, then the warps' sums one by one.
inline double fold_norms(const double* lane) {
  double sum = 0.0;
  for (int warp = 0; warp < kNormLanes; warp += kLanes) sum += fold_lanes(lane + warp);
  return sum;
}

// A bound on the rounding error of a swap's computed change. `norms` is the sum of the two weights' norms, `row_norm`
// that of the row's. By Cauchy-Schwarz |G_ij| <= sqrt(G_ii G_jj), so every partial sum of c_i is at most sqrt(G_ii)
// row_norm; it was rounded once for each column and twice for each swap, by u = 2^-53 each time. That error counts
// twice in the change, times the weight. The 8 covers the rounding of the change itself. A swap that gains more than
// the bound lowers the exact loss.
ACE_HD double swap_rounding(double norms, double row_norm, int64_t cols, int64_t swaps) {
  constexpr double kUnit = 1.1102230246251565e-16;
  return 2.0 * kUnit * (static_cast<double>(cols) + 2.0 * static_cast<double>(swaps) + 8.0) * norms * row_norm;
}

}  // namespace ace
