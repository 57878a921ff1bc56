// The change of the loss by a swap, against the loss itself.
#include <gtest/gtest.h>

#include <vector>

#include "core/swaps.h"

namespace ace {
namespace {

// e^T G e of two columns.
double loss(double e0, double e1, const double g[2][2]) {
  return e0 * e0 * g[0][0] + 2.0 * e0 * e1 * g[0][1] + e1 * e1 * g[1][1];
}

TEST(Swap, ChangesAddUpToTheLoss) {
  const double g[2][2] = {{4.0, -3.0}, {-3.0, 5.0}}, w0 = 2.0, w1 = -7.0;
  const double c0 = w0 * g[0][0], c1 = w0 * g[1][0];  // weight 0 is removed
  const double restored = loss_change(-w0, c0, g[0][0]);
  EXPECT_EQ(restored, -loss(w0, 0.0, g));
  EXPECT_EQ(loss_change(w1, c1, g[1][1]), loss(w0, w1, g) - loss(w0, 0.0, g));
  EXPECT_EQ(restored + loss_change(w1, c1 - w0 * g[0][1], g[1][1]), loss(0.0, w1, g) - loss(w0, 0.0, g));
}

TEST(Swap, NormsOfAllLanesAreAdded) {
  std::vector<double> lane(kNormLanes);
  for (int l = 0; l < kNormLanes; ++l) lane[static_cast<size_t>(l)] = l;
  EXPECT_EQ(fold_norms(lane.data()), kNormLanes * (kNormLanes - 1) / 2);
  EXPECT_EQ(output_norm(-3.0, diagonal_root(16.0)), 12.0);
}

TEST(Swap, RoundingGrowsWithColumnsAndSwaps) {
  const double unit = std::ldexp(1.0, -53);
  EXPECT_EQ(swap_rounding(4.0, 2.0, 0, 0), 128.0 * unit);
  EXPECT_EQ(swap_rounding(1.0, 2.0, 100, 7) - swap_rounding(1.0, 2.0, 0, 0), 4.0 * 114.0 * unit);
}

}  // namespace
}  // namespace ace
