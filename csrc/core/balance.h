// Exchanges a kept and a removed weight of one row. The removed weights cost sum a_j + s^2, s = sum b_j, with a_j =
// w_j^2 variance_j and b_j = w_j mean_j: e^T G e (core/swaps.h) for G = diag(variance) + mean mean^T.
//
// Candidates are found in float32 and swapped in float64. A product of two float32 values is exact in float64, and all
// back ends add in the same order, so they find the same swaps.
#pragma once

#include <cmath>

#include "core/lanes.h"
#include "core/scalar.h"

namespace ace {

// The change of the cost if column j alone changes sides at a shift of `twice_shift` / 2: removed if it is kept, else
// restored. Restoring is removing with the sign of b reversed and the cost -a.
struct SearchTerms {
  float square;  // b^2
  float pull;    // a + 2 s b
  ACE_HD float if_removed() const { return square + pull; }
  ACE_HD float if_restored() const { return square - pull; }
};

ACE_HD SearchTerms search_terms(float weight, float variance, float mean, float twice_shift) {
  const float shift = weight * mean;
  return {shift * shift, weight * weight * variance + twice_shift * shift};
}

// What one weight adds to the sums over the removed weights; for an exchange, the removed weight's terms less the
// restored one's.
struct Removal {
  double spread;  // a
  double shift;   // b
};

ACE_HD Removal removal(float weight, float variance, float mean) {
  const double w = static_cast<double>(weight);
  return {w * w * static_cast<double>(variance), w * static_cast<double>(mean)};
}

ACE_HD Removal exchange(const Removal& removed, const Removal& restored) {
  return {removed.spread - restored.spread, removed.shift - restored.shift};
}

// The change of the cost if this is added at the shift s. To restore a weight, add {-a, -b}.
ACE_HD double cost_change(const Removal& added, double s) {
  return added.spread + added.shift * (2.0 * s + added.shift);
}

// A bound on the rounding error of an exchange's computed change, in a row whose |b| sum to at most `shifts`, after
// `swaps` earlier exchanges. s is a sum of `cols` terms and two more for each swap, whose partial sums never exceed
// `shifts`: its error is at most u (cols + 4 swaps) shifts with u = 2^-53, and counts 2 |d| times for an exchange that
// shifts by d. The other roundings (a, d, the product, the sums) are within 8 u of the spreads and 16 u of |d| (2 |s| +
// |d|).
ACE_HD double balance_rounding(double spreads, double shift, double shifts, int64_t cols, int64_t swaps) {
  constexpr double kUnit = 1.1102230246251565e-16;
  const double count = static_cast<double>(cols) + 4.0 * static_cast<double>(swaps) + 24.0;
  return kUnit * (8.0 * spreads + 2.0 * count * fabs(shift) * shifts);
}

// An upper bound of a row's sum of |b|, given that sum in float32. There are at most two roundings a column, each of
// 2^-24 of the sum; terms below 2^-126 may vanish.
ACE_HD double shifts_bound(float sum, int64_t cols) {
  const double count = static_cast<double>(cols);
  return static_cast<double>(sum) * (1.0 + count * 2.384185791015625e-07) + count * 1.1754943508222875e-38;
}

}  // namespace ace
