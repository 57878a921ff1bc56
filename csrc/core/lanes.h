// Sums over a row in a fixed order that suits both a warp and vector instructions: column j is added in lane j %
// kLanes.
#pragma once

namespace ace {

constexpr int kLanes = 32;

// The sum over the lanes in the order of a warp reduction: by halves.
template <class Real>
Real fold_lanes(const Real* lane) {
  Real sum[kLanes];
  for (int l = 0; l < kLanes; ++l) sum[l] = lane[l];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

}  // namespace ace
