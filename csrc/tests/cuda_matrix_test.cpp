// The CUDA kernels of prune_topk_ and topk_mask (group "matrix"), prune_at_, score_histogram and score, on the host.
#include "cuda/across.h"
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "cuda/score.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

template <class T>
class MatrixOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(MatrixOf, Dtypes);

template <class T>
void zero_rest(Sample<T>& sample, const std::vector<uint32_t>& keys, Cut cut) {
  apply_reference(keys, cut, [&](int64_t n) { sample.weight(n / sample.cols(), n % sample.cols()) = T{}; });
}

template <class T>
void check_matrix(Shape shape, Formula formula, Values values, int64_t keep_k) {
  const std::string what = "shape " + std::to_string(shape.rows) + "x" + std::to_string(shape.cols) + ", formula " +
                           std::to_string(static_cast<int>(formula)) + ", keep_k " + std::to_string(keep_k) +
                           ", order " + std::to_string(simt::settings.order);
  Sample<T> got(shape, formula, values), want(shape, formula, values), masked(shape, formula, values);
  const std::vector<uint32_t> keys = want.keys();
  const Cut cut = reference_cut(keys, keep_k);
  zero_rest(want, keys, cut);
  std::vector<float> threshold(1, -1.0f);
  Workspace work(prune_matrix_bytes(got.arguments())), sums(score_sums_bytes(got.arguments()));
  ASSERT_EQ(launch_prune_matrix(got.arguments(), keep_k, threshold.data(), work.data(), sums.data(), 1, nullptr),
            cudaSuccess);
  expect_same_bits(got.buffer(), want.buffer(), what + ": weight");
  expect_same_bits(threshold, {cut_threshold(cut)}, what + ": threshold");
  std::vector<uint8_t> kept(keys.size(), 1);
  apply_reference(keys, cut, [&](int64_t n) { kept[static_cast<size_t>(n)] = 0; });
  expect_mask(masked, kept, what, [&](bool* mask) {
    return launch_mask_matrix(masked.arguments(), keep_k, mask, work.data(), sums.data(), 1, nullptr);
  });
  EXPECT_EQ(take_flag(), 0);
}

TYPED_TEST(MatrixOf, EqualsThePlainSelection) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Shape shape : {Shape{1, 1}, Shape{7, 33}, Shape{3, 2049, 3}, Shape{40, 129, 0, 1}}) {
      const int64_t n = shape.rows * shape.cols;
      for (const int64_t keep_k : {int64_t{0}, int64_t{1}, n / 2, n - 1, n}) {
        if (keep_k <= n) check_matrix<TypeParam>(shape, Formula::scaled, Values::spread, keep_k);
      }
    }
  }
}

TYPED_TEST(MatrixOf, KeepsExactlyKAmongTies) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int64_t keep_k : {1, 1000, 2500, 4000}) {
      check_matrix<TypeParam>({2, 2100}, Formula::magnitude, Values::ties, keep_k);
    }
    // Rows handled four at a time, and one more: a missed count moves the last tie.
    for (const int64_t keep_k : {3000, 7000}) {
      check_matrix<TypeParam>({5, 2056}, Formula::scaled, Values::ties, keep_k);
    }
  }
}

TYPED_TEST(MatrixOf, MoreTilesThanBlocks) {
  simt::settings.processors = 1;
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    check_matrix<TypeParam>({40, 264}, Formula::scaled, Values::ties, 5000);  // a tile's ties are in two warps
  }
}

TYPED_TEST(MatrixOf, TakesEveryFormula) {
  for (const Formula formula : kAllFormulas) check_matrix<TypeParam>({9, 72}, formula, Values::spread, 300);
}

TYPED_TEST(MatrixOf, NegativeColumnFactors) {
  Sample<TypeParam> got({4, 64}, Formula::scaled, Values::ties), want({4, 64}, Formula::scaled, Values::ties);
  std::vector<float> column(64);
  for (size_t j = 0; j < 64; ++j) column[j] = j % 3 == 0 ? 0.0f : -1.0f;
  ScoredArguments arguments = got.arguments();
  arguments.column = column.data();
  std::vector<uint32_t> keys;
  for (int64_t n = 0; n < 256; ++n) {
    const float weight = to_float(want.weight(n / 64, n % 64));
    keys.push_back(order_key(ScaledScore::value(weight, {column[static_cast<size_t>(n % 64)], 0, 0, 0})));
  }
  zero_rest(want, keys, reference_cut(keys, 50));
  float threshold = 0.0f;
  Workspace work(prune_matrix_bytes(arguments));
  ASSERT_EQ(launch_prune_matrix(arguments, 50, &threshold, work.data(), nullptr, 1, nullptr), cudaSuccess);
  expect_same_bits(got.buffer(), want.buffer(), "negative factors");
}

TYPED_TEST(MatrixOf, CutFromHistograms) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    Sample<TypeParam> got({5, 700}, Formula::ria, Values::spread), want({5, 700}, Formula::ria, Values::spread);
    const std::vector<uint32_t> keys = want.keys();
    Workspace work(prune_matrix_bytes(got.arguments())), sums(score_sums_bytes(got.arguments()));
    Cut cut{0, 1234};
    for (int level = 0; level < kRadixPasses; ++level) {
      std::vector<int64_t> counts(static_cast<size_t>(radix_bins(level))), expected(counts.size());
      ASSERT_EQ(
          launch_score_histogram(got.arguments(), cut.key, level, counts.data(), work.data(), sums.data(), 1, nullptr),
          cudaSuccess);
      for (const uint32_t key : keys) {
        if (radix_matches(key, cut.key, level)) ++expected[radix_bin(key, level)];
      }
      ASSERT_EQ(counts, expected) << level;
      const RadixBin found = find_bin(counts.data(), radix_bins(level), cut.ties);
      cut = {cut.key | found.bin << radix_digit(level).shift, cut.ties - found.above};
    }
    ASSERT_EQ(launch_prune_at(got.arguments(), cut, work.data(), sums.data(), 1, nullptr), cudaSuccess);
    zero_rest(want, keys, cut);
    expect_same_bits(got.buffer(), want.buffer(), "prune_at");
  }
}

TYPED_TEST(MatrixOf, PruneAtKeepsTheFirstTies) {
  for (const int64_t ties : {0, 1, 77, 100000}) {
    Sample<TypeParam> got({6, 90}, Formula::magnitude, Values::ties), want({6, 90}, Formula::magnitude, Values::ties);
    const std::vector<uint32_t> keys = want.keys();
    const Cut cut{keys[3], ties};
    Workspace work(prune_matrix_bytes(got.arguments()));
    ASSERT_EQ(launch_prune_at(got.arguments(), cut, work.data(), nullptr, 1, nullptr), cudaSuccess);
    zero_rest(want, keys, cut);
    expect_same_bits(got.buffer(), want.buffer(), "ties " + std::to_string(ties));
  }
}

TYPED_TEST(MatrixOf, WhatIsNotFiniteLeavesAllAlone) {
  for (const Formula formula : {Formula::magnitude, Formula::scaled}) {
    Sample<TypeParam> got({4, 50}, formula, Values::spread);
    got.weight(3, 1) = not_finite<TypeParam>();
    const std::vector<TypeParam> before = got.buffer();
    Workspace work(prune_matrix_bytes(got.arguments()));
    for (const int64_t keep_k : {0, 60}) {
      float threshold = 0.0f;
      ASSERT_EQ(launch_prune_matrix(got.arguments(), keep_k, &threshold, work.data(), nullptr, 3, nullptr),
                cudaSuccess);
      EXPECT_TRUE(std::isnan(threshold));
      EXPECT_EQ(take_flag(), 3);
      expect_mask(got, std::vector<uint8_t>(200, 1), "not finite", [&](bool* mask) {
        return launch_mask_matrix(got.arguments(), keep_k, mask, work.data(), nullptr, 2, nullptr);
      });
      EXPECT_EQ(take_flag(), 2);
    }
    ASSERT_EQ(launch_prune_at(got.arguments(), {0x80000000u, 0}, work.data(), nullptr, 4, nullptr), cudaSuccess);
    EXPECT_EQ(take_flag(), 4);
    std::vector<float> scores(200);
    ASSERT_EQ(launch_score(got.arguments(), scores.data(), nullptr, 5, nullptr), cudaSuccess);
    EXPECT_EQ(take_flag(), 5);
    expect_same_bits(got.buffer(), before, "not finite");
  }
}

template <class T>
void check_scores(Shape shape, Formula formula) {
  Sample<T> sample(shape, formula, Values::spread);
  std::vector<float> out(static_cast<size_t>(shape.rows * shape.cols));
  Workspace sums(score_sums_bytes(sample.arguments()));
  ASSERT_EQ(launch_score(sample.arguments(), out.data(), sums.data(), 1, nullptr), cudaSuccess);
  expect_same_bits(out, sample.scores(), "formula " + std::to_string(static_cast<int>(formula)));
  EXPECT_EQ(take_flag(), 0);
}

TYPED_TEST(MatrixOf, ScoresHaveTheFunctorsBits) {
  for (const Formula formula : kAllFormulas) {
    check_scores<TypeParam>({3, 77}, formula);
    check_scores<TypeParam>({1100, 40, 8}, formula);
  }
}

TYPED_TEST(MatrixOf, MoreStripsThanBlocks) {
  simt::settings.processors = 1;
  check_scores<TypeParam>({3, 5000}, Formula::ria);
}

}  // namespace
}  // namespace ace::cuda
