// The formulas of restore_mean_, by hand; the kernels' tests use them as they are.
#include <gtest/gtest.h>

#include <limits>

#include "core/restore.h"

namespace ace {
namespace {

TEST(Restoring, HandComputed) {
  const RestoreTerms terms = restore_terms(3.0f, -2.0f, 5.0f);
  EXPECT_EQ(terms.shift, -6.0);
  EXPECT_EQ(terms.gain, -10.0);
  EXPECT_EQ(restore_scale(6.0, 2.0), 2.0);
  EXPECT_EQ(restored_weight(1.0f, 3.0f, 0.5), 2.5f);
}

TEST(Restoring, TheMeanIsThatOfTheDenseRow) {
  const double mean[] = {2.0, -1.0, 4.0}, weight[] = {1.0, 3.0, -2.0}, direction[] = {1.0, -0.5, 2.0};  // 0 is removed
  double shift = 0.0, gain = 0.0, dense = 0.0, pruned = 0.0;
  for (int j = 0; j < 3; ++j) {
    const bool kept = j > 0;
    const RestoreTerms terms = restore_terms(kept ? 0.0f : static_cast<float>(weight[j]), static_cast<float>(mean[j]),
                                             kept ? static_cast<float>(direction[j]) : 0.0f);
    shift += terms.shift;
    gain += terms.gain;
    dense += weight[j] * mean[j];
  }
  // The scale's denominator is 1 more than the gain: that much of the shift stays.
  const double scale = restore_scale(shift, gain);
  for (int j = 1; j < 3; ++j) {
    pruned += mean[j] * (weight[j] + scale * direction[j]);
  }
  EXPECT_NEAR(dense - pruned, scale, 1e-12);
}

TEST(Restoring, ADirectionMustNotTurnTheMean) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(is_restorable(1.0f, 2.0f));
  EXPECT_TRUE(is_restorable(-1.0f, -2.0f));
  EXPECT_TRUE(is_restorable(0.0f, -5.0f));
  EXPECT_TRUE(is_restorable(-5.0f, 0.0f));
  EXPECT_FALSE(is_restorable(1.0f, -2.0f));
  EXPECT_FALSE(is_restorable(-1.0f, 2.0f));
  EXPECT_FALSE(is_restorable(1e-30f, -1e-30f));  // in float32 the product would be -0
  for (const float bad : {inf, -inf, nan}) {
    EXPECT_FALSE(is_restorable(bad, 1.0f));
    EXPECT_FALSE(is_restorable(bad, bad));
    EXPECT_FALSE(is_restorable(1.0f, bad));
  }
}

}  // namespace
}  // namespace ace
