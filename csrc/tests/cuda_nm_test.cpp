// The CUDA kernels of prune_nm_ and nm_mask on the host, against keep_best.
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

template <class T>
class NmOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(NmOf, Dtypes);

template <class T>
void check_nm(Shape shape, Formula formula, Values values, int keep_n, int group_m) {
  Sample<T> got(shape, formula, values), want(shape, formula, values), masked(shape, formula, values);
  const std::vector<uint32_t> keys = want.keys();
  std::vector<uint8_t> all_kept;
  for (int64_t n = 0; n < shape.rows * shape.cols; n += group_m) {
    const uint32_t kept = keep_best<0>(keys.data() + n, group_m, keep_n);
    for (int g = 0; g < group_m; ++g) {
      all_kept.push_back(kept >> g & 1u);
      if (all_kept.back() == 0) want.weight(n / shape.cols, n % shape.cols + g) = T{};
    }
  }
  Workspace sums(score_sums_bytes(got.arguments()));
  ASSERT_EQ(launch_prune_nm(got.arguments(), keep_n, group_m, sums.data(), 1, nullptr), cudaSuccess);
  const std::string what =
      std::to_string(keep_n) + ":" + std::to_string(group_m) + ", cols " + std::to_string(shape.cols);
  expect_same_bits(got.buffer(), want.buffer(), what);
  expect_mask(masked, all_kept, what, [&](bool* mask) {
    return launch_mask_nm(masked.arguments(), keep_n, group_m, mask, sums.data(), 1, nullptr);
  });
  EXPECT_EQ(take_flag(), 0);
}

TYPED_TEST(NmOf, EqualsThePlainSelection) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int group_m : {1, 2, 3, 4, 5, 8, 12, 16, 17, 31, 32}) {
      for (const int keep_n : {0, 1, group_m / 2, group_m}) {
        check_nm<TypeParam>({3, 3 * group_m}, Formula::scaled, Values::spread, keep_n, group_m);
        check_nm<TypeParam>({2, 40 * group_m}, Formula::magnitude, Values::ties, keep_n, group_m);
      }
    }
  }
}

TYPED_TEST(NmOf, TakesViewsWithoutAlignment) {
  for (const int group_m : {2, 4, 8, 16}) {
    check_nm<TypeParam>({3, 2064, 5}, Formula::cosp, Values::spread, group_m / 2, group_m);
    check_nm<TypeParam>({3, 48, 8, 3}, Formula::cosp_exact, Values::ties, group_m / 2, group_m);
  }
}

TYPED_TEST(NmOf, TakesEveryFormula) {
  for (const Formula formula : kAllFormulas) {
    check_nm<TypeParam>({5, 88}, formula, Values::spread, 2, 4);
    check_nm<TypeParam>({5, 88}, formula, Values::spread, 5, 11);
  }
}

TYPED_TEST(NmOf, AGroupThatIsNotFiniteIsLeftAlone) {
  for (int n = 0; n < 8; ++n) {
    const int group_m = 2 + n % 4 * 2;
    const Formula formula = n < 4 ? Formula::magnitude : Formula::scaled;
    Sample<TypeParam> got({2, 24}, formula, Values::spread);
    const std::vector<uint32_t> keys = got.keys();
    std::vector<uint8_t> all_kept;
    for (int first = 0; first < 48; first += group_m) {
      const bool finite = first > 37 || 37 >= first + group_m;
      const uint32_t kept = finite ? keep_best<0>(keys.data() + first, group_m, 1) : ~0u;
      for (int g = 0; g < group_m; ++g) all_kept.push_back(kept >> g & 1u);
    }
    got.weight(1, 13) = not_finite<TypeParam>();
    expect_mask(got, all_kept, "not finite",
                [&](bool* mask) { return launch_mask_nm(got.arguments(), 1, group_m, mask, nullptr, 8, nullptr); });
    EXPECT_EQ(take_flag(), 8);
    ASSERT_EQ(launch_prune_nm(got.arguments(), 1, group_m, nullptr, 9, nullptr), cudaSuccess);
    EXPECT_EQ(take_flag(), 9);
    int64_t kept = 0;
    for (int64_t place = 0; place < 48; ++place) kept += bits_of(got.weight(place / 24, place % 24)) != 0;
    EXPECT_EQ(kept, 48 / group_m - 1 + group_m);
  }
}

}  // namespace
}  // namespace ace::cuda
