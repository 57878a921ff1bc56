// The CUDA kernel of balance_mean_ on the host, against plain loops over the same formulas.
#include "cuda/balance.h"
#include "tests/plain_balance.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

template <class T>
struct BalanceCase {
  Sample<T> weight;
  Layout layout;  // of the mask
  std::vector<float> variance, mean;
  Mask mask;
  int group_m;
  int64_t rounds;

  BalanceCase(Shape shape, Values values, int n, int m, int64_t most = 3)
      : weight(shape, Formula::magnitude, values), layout{shape.rows, shape.cols, 3}, group_m(m), rounds(most) {
    std::mt19937 random(3);
    for (int64_t j = 0; j < shape.cols; ++j) {
      variance.push_back(absolute(random_value<float>(random, values)));
      mean.push_back(random_value<float>(random, values));
    }
    mask = random_mask(layout, n, m, random);
  }

  std::vector<int64_t> launch(int code = 1) {
    const BalanceArguments arguments{&weight.weight(0, 0), mask.get(),      variance.data(), mean.data(), layout.rows,
                                     layout.cols,          weight.stride(), layout.stride(), rounds,      group_m,
                                     dtype_of<T>()};
    std::vector<int64_t> swaps(static_cast<size_t>(layout.rows), -7);
    EXPECT_EQ(launch_balance_mean(arguments, swaps.data(), code, nullptr), cudaSuccess);
    return swaps;
  }

  std::vector<int64_t> balance_plainly(const Mask& of) {
    std::vector<int64_t> swaps;
    for (int64_t i = 0; i < layout.rows; ++i) {
      std::vector<float> row;
      for (int64_t j = 0; j < layout.cols; ++j) row.push_back(to_float(weight.weight(i, j)));
      swaps.push_back(PlainRow(row, variance, mean, of.get() + i * layout.stride()).balance(group_m, rounds));
    }
    return swaps;
  }
};

template <class T>
void check_balance(BalanceCase<T>&& got) {
  const Mask want = copy_of(got.mask, got.layout);
  const std::vector<int64_t> swaps = got.balance_plainly(want);
  const std::string what = std::to_string(got.layout.cols) + " columns, groups of " + std::to_string(got.group_m);
  EXPECT_EQ(got.launch(), swaps) << what;
  expect_same_masks(got.mask, want, got.layout, what);
  EXPECT_EQ(take_flag(), 0);
}

template <class T>
class BalanceOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(BalanceOf, Dtypes);

TYPED_TEST(BalanceOf, EqualsThePlainSearch) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Values values : {Values::spread, Values::ties}) {
      check_balance(BalanceCase<TypeParam>({2, 1}, values, 0, 0));
      check_balance(BalanceCase<TypeParam>({3, 40, 5, 1}, values, 0, 0));
      check_balance(BalanceCase<TypeParam>({3, 40, 5, 1}, values, 2, 4));
      check_balance(BalanceCase<TypeParam>({2, 35}, values, 3, 7));
      check_balance(BalanceCase<TypeParam>({2, 64}, values, 11, 32));
      check_balance(BalanceCase<TypeParam>({9, 64}, values, 4, 8, 1));
    }
  }
}

TYPED_TEST(BalanceOf, TakesManyColumnsAndRows) {
  check_balance(BalanceCase<TypeParam>({2, 1100}, Values::spread, 0, 0));
  check_balance(BalanceCase<TypeParam>({2, 1100}, Values::spread, 2, 4));
  simt::settings.processors = 1;  // fewer blocks than rows: each warp handles several
  check_balance(BalanceCase<TypeParam>({200, 33}, Values::spread, 0, 0));
}

TYPED_TEST(BalanceOf, SwapsAndEnds) {
  BalanceCase<TypeParam> one({3, 200}, Values::spread, 0, 0, 1), all({3, 200}, Values::spread, 0, 0, 100);
  const std::vector<int64_t> first = one.launch(), last = all.launch();
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_GT(first[i], 1);
    EXPECT_LE(first[i], kLanes);
    EXPECT_GT(last[i], first[i]);
    EXPECT_LT(last[i], 200);
  }
}

TYPED_TEST(BalanceOf, LeavesAloneWhatItCannotUse) {
  for (const int group_m : {0, 4}) {
    BalanceCase<TypeParam> weight({3, 40}, Values::spread, 2, group_m);
    weight.weight.weight(1, 39) = not_finite<TypeParam>();
    const Mask before = copy_of(weight.mask, weight.layout);
    const std::vector<int64_t> swaps = weight.launch(5);
    EXPECT_EQ(take_flag(), 5);
    EXPECT_GT(swaps[0], 0);
    EXPECT_EQ(swaps[1], -1);
    EXPECT_GT(swaps[2], 0);
    for (int64_t j = 43; j < 2 * 43; ++j) EXPECT_EQ(weight.mask[j], before[j]);
    for (const float bad : {not_finite<float>(), -1.0f}) {
      BalanceCase<TypeParam> column({3, 40}, Values::spread, 2, group_m);
      column.variance[7] = bad;
      EXPECT_EQ(column.launch(6), (std::vector<int64_t>{-1, -1, -1}));
      EXPECT_EQ(take_flag(), 6);
      expect_same_masks(column.mask, before, column.layout, "variance");
    }
    BalanceCase<TypeParam> mean({3, 40}, Values::spread, 2, group_m);
    mean.mean[7] = not_finite<float>();
    EXPECT_EQ(mean.launch(6), (std::vector<int64_t>{-1, -1, -1}));
    EXPECT_EQ(take_flag(), 6);
  }
}

}  // namespace
}  // namespace ace::cuda
