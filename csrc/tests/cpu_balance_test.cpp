// The CPU's balance_mean_ against plain loops over the same formulas.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/balance_row.h"
#include "tests/plain_balance.h"

namespace ace::cpu {
namespace {

struct Columns {
  std::vector<float> weight, variance, mean;

  // With `ties` values repeat.
  Columns(int64_t cols, bool ties, unsigned seed) {
    std::mt19937 random(seed);
    const auto draw = [&] { return static_cast<float>(random() % (ties ? 4 : 1 << 20)) / (ties ? 2.0f : 1 << 18); };
    for (int64_t j = 0; j < cols; ++j) {
      weight.push_back(draw() - (ties ? 1.0f : 2.0f));
      variance.push_back(draw());
      mean.push_back(draw() - 1.0f);
    }
  }
};

// Keeps `keep` of each group, or of the row.
std::unique_ptr<bool[]> some_kept(int64_t cols, int keep, int64_t group) {
  std::unique_ptr<bool[]> mask(new bool[static_cast<uint32_t>(cols)]);
  for (int64_t j = 0; j < cols; ++j) mask[static_cast<size_t>(j)] = j % group < keep;
  return mask;
}

void check(int64_t cols, int keep, int group_m, bool ties) {
  const Columns of(cols, ties, static_cast<unsigned>(cols));
  const auto got = some_kept(cols, keep, group_m > 0 ? group_m : 2),
             want = some_kept(cols, keep, group_m > 0 ? group_m : 2);
  const RowBalancer<float> balancer(of.variance.data(), of.mean.data(), cols, group_m);
  const BalanceRow<float> row{of.weight.data(), of.variance.data(), of.mean.data(), got.get(), cols};
  const std::string what = std::to_string(cols) + " columns, groups of " + std::to_string(group_m);
  EXPECT_EQ(balancer.balance(row, balancer.start(row), 3),
            PlainRow(of.weight, of.variance, of.mean, want.get()).balance(group_m, 3))
      << what;
  EXPECT_TRUE(std::equal(got.get(), got.get() + cols, want.get())) << what;
}

TEST(CpuBalance, EqualsThePlainSearch) {
  for (const bool ties : {false, true}) {
    for (const int64_t cols : {1, 2, 31, 32, 33, 129, 1134}) check(cols, 1, 0, ties);
    for (const int64_t groups : {1, 31, 32, 33, 100}) {
      check(4 * groups, 2, 4, ties);
      check(8 * groups, 3, 8, ties);
      check(7 * groups, 3, 7, ties);
      check(32 * groups, 11, 32, ties);
    }
  }
}

}  // namespace
}  // namespace ace::cpu
