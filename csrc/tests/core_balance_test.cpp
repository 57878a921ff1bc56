// The change of a row's cost by an exchange, against the cost itself.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "core/balance.h"

namespace ace {
namespace {

const float kWeight[] = {2.0f, -7.0f, 0.5f}, kVariance[] = {3.0f, 0.25f, 2.0f}, kMean[] = {-1.0f, 0.5f, 4.0f};

Removal at(int j) { return removal(kWeight[j], kVariance[j], kMean[j]); }

// The cost of the removed columns: sum a + (sum b)^2.
double cost(const std::vector<int>& removed) {
  double spread = 0.0, shift = 0.0;
  for (const int j : removed) {
    spread += at(j).spread;
    shift += at(j).shift;
  }
  return spread + shift * shift;
}

TEST(Balance, ChangesAddUpToTheCost) {
  EXPECT_EQ(cost_change(at(0), 0.0), cost({0}));
  EXPECT_EQ(cost_change(at(1), at(0).shift), cost({0, 1}) - cost({0}));
  EXPECT_EQ(cost_change(exchange(at(2), at(0)), at(0).shift + at(1).shift), cost({1, 2}) - cost({0, 1}));
}

TEST(Balance, TheSearchSeesTheSameChanges) {
  const double s = at(0).shift + at(1).shift;  // 0 and 1 are removed
  const auto terms = [&](int j) {
    return search_terms(kWeight[j], kVariance[j], kMean[j], static_cast<float>(2.0 * s));
  };
  EXPECT_EQ(terms(2).if_removed(), static_cast<float>(cost({0, 1, 2}) - cost({0, 1})));
  EXPECT_EQ(terms(0).if_restored(), static_cast<float>(cost({1}) - cost({0, 1})));
}

TEST(Balance, RoundingGrowsWithColumnsAndSwaps) {
  const double unit = std::ldexp(1.0, -53);
  EXPECT_EQ(balance_rounding(4.0, -2.0, 4.0, 0, 0), unit * (32.0 + 2.0 * 24.0 * 8.0));
  EXPECT_EQ(balance_rounding(0.0, 1.0, 1.0, 100, 7), unit * 2.0 * 152.0);
}

TEST(Balance, SumsOfLanes) {
  std::vector<double> lane(kLanes);
  for (int l = 0; l < kLanes; ++l) lane[static_cast<size_t>(l)] = l;
  EXPECT_EQ(fold_lanes(lane.data()), kLanes * (kLanes - 1) / 2);
  EXPECT_EQ(shifts_bound(0.0f, 4), 4.0 * std::ldexp(1.0, -126));
  EXPECT_EQ(shifts_bound(2.0f, 1 << 22), 4.0 + std::ldexp(1.0, -104));
}

}  // namespace
}  // namespace ace
