// The CUDA kernels of prune_topk_ and topk_mask (group "row") on the host, against select_kth.
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

template <class T>
void check_rows(Shape shape, Formula formula, Values values, int64_t keep_k) {
  const std::string what = "rows " + std::to_string(shape.rows) + ", cols " + std::to_string(shape.cols) +
                           ", formula " + std::to_string(static_cast<int>(formula)) + ", keep_k " +
                           std::to_string(keep_k) + ", order " + std::to_string(simt::settings.order);
  Sample<T> got(shape, formula, values), want(shape, formula, values), masked(shape, formula, values);
  const std::vector<uint32_t> keys = want.keys();
  std::vector<uint8_t> kept(keys.size(), 1);
  std::vector<float> threshold(static_cast<size_t>(shape.rows), -1.0f), expected;
  Workspace sums(score_sums_bytes(got.arguments()));
  ASSERT_EQ(launch_prune_rows(got.arguments(), keep_k, threshold.data(), sums.data(), 1, nullptr), cudaSuccess);
  for (int64_t i = 0; i < shape.rows; ++i) {
    const std::vector<uint32_t> row(keys.begin() + i * shape.cols, keys.begin() + (i + 1) * shape.cols);
    const Cut cut = reference_cut(row, keep_k);
    expected.push_back(cut_threshold(cut));
    apply_reference(row, cut, [&](int64_t j) {
      want.weight(i, j) = T{};
      kept[static_cast<size_t>(i * shape.cols + j)] = 0;
    });
  }
  expect_same_bits(got.buffer(), want.buffer(), what + ": weight");
  expect_same_bits(threshold, expected, what + ": threshold");
  expect_mask(masked, kept, what,
              [&](bool* mask) { return launch_mask_rows(masked.arguments(), keep_k, mask, sums.data(), 1, nullptr); });
  EXPECT_EQ(take_flag(), 0);
}

class Rows : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

template <class T>
class RowsOf : public Rows {};

TYPED_TEST_SUITE(RowsOf, Dtypes);

TYPED_TEST(RowsOf, EqualThePlainSelection) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int64_t cols : {1, 2, 31, 32, 33, 129, 1134}) {
      for (const int64_t keep_k : {int64_t{0}, int64_t{1}, cols / 2, cols - 1, cols}) {
        if (keep_k <= cols) check_rows<TypeParam>({2, cols}, Formula::scaled, Values::spread, keep_k);
      }
    }
  }
}

TYPED_TEST(RowsOf, KeepExactlyKAmongTies) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int64_t keep_k : {1, 300, 567, 1133}) {
      const Formula formula = keep_k < 500 ? Formula::magnitude : Formula::scaled;
      check_rows<TypeParam>({3, 1134}, formula, Values::ties, keep_k);
      check_rows<TypeParam>({2, 129}, Formula::given, Values::ties, keep_k % 129);
    }
  }
}

TYPED_TEST(RowsOf, TakeEveryFormula) {
  for (const Formula formula : kAllFormulas) check_rows<TypeParam>({5, 200}, formula, Values::spread, 71);
}

TYPED_TEST(RowsOf, TakeViewsWithoutAlignment) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    check_rows<TypeParam>({3, 136, 3}, Formula::cosp, Values::spread, 60);
    check_rows<TypeParam>({3, 136, 8}, Formula::cosp, Values::spread, 60);
    check_rows<TypeParam>({3, 135, 1, 1}, Formula::scaled, Values::ties, 60);
  }
}

TYPED_TEST(RowsOf, TooLongForTheChip) {
  simt::settings.max_shared = 0;
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int64_t cols : {1, 33, 1134}) {
      check_rows<TypeParam>({2, cols}, Formula::scaled, Values::spread, cols / 2);
      check_rows<TypeParam>({2, cols, 2}, Formula::magnitude, Values::ties, cols / 2);
    }
  }
}

TYPED_TEST(RowsOf, LongRowsUseMoreThreads) {
  check_rows<TypeParam>({1, 5000}, Formula::scaled, Values::spread, 2500);
  check_rows<TypeParam>({1, 17001}, Formula::magnitude, Values::ties, 8000);
}

// Widths of real models. Between 20337 and 24576 columns static shared memory and the row together exceed the default
// limit, while the row alone does not.
TYPED_TEST(RowsOf, TakeTheWidthsOfLargeModels) {
  for (const int64_t cols : {20480, 22016, 24576, 28672, 53248}) {
    check_rows<TypeParam>({1, cols}, Formula::scaled, Values::spread, cols / 2);
  }
}

TYPED_TEST(RowsOf, MoreRowsThanBlocks) {
  simt::settings.processors = 1;
  check_rows<TypeParam>({19, 40}, Formula::ria, Values::ties, 13);
}

TYPED_TEST(RowsOf, ARowThatIsNotFiniteIsLeftAlone) {
  for (int n = 0; n < 4; ++n) {
    const Formula formula = n < 2 ? Formula::magnitude : Formula::scaled;
    simt::settings.max_shared = n % 2 == 0 ? 0 : simt::kMaxShared;
    Sample<TypeParam> got({3, 70}, formula, Values::spread);
    got.weight(1, 69) = not_finite<TypeParam>();
    std::vector<TypeParam> before;
    for (int64_t j = 0; j < 70; ++j) before.push_back(got.weight(1, j));
    std::vector<uint8_t> mask_kept(3 * 70, 1);
    Sample<TypeParam> finite({3, 70}, formula, Values::spread);
    const std::vector<uint32_t> keys = finite.keys();
    for (const size_t i : {0, 2}) {
      const std::vector<uint32_t> row(keys.begin() + static_cast<long>(i) * 70,
                                      keys.begin() + static_cast<long>(i + 1) * 70);
      apply_reference(row, reference_cut(row, 20), [&](int64_t j) { mask_kept[i * 70 + static_cast<size_t>(j)] = 0; });
    }
    expect_mask(got, mask_kept, "not finite",
                [&](bool* mask) { return launch_mask_rows(got.arguments(), 20, mask, nullptr, 6, nullptr); });
    EXPECT_EQ(take_flag(), 6);
    std::vector<float> threshold(3);
    ASSERT_EQ(launch_prune_rows(got.arguments(), 20, threshold.data(), nullptr, 5, nullptr), cudaSuccess);
    EXPECT_EQ(take_flag(), 5);
    EXPECT_TRUE(std::isnan(threshold[1]));
    for (const int64_t i : {0, 1, 2}) {
      int64_t kept = 0;
      for (int64_t j = 0; j < 70; ++j) {
        kept += bits_of(got.weight(i, j)) != 0;
        if (i != 1) continue;
        EXPECT_EQ(bits_of(got.weight(i, j)), bits_of(before[static_cast<size_t>(j)]));
      }
      EXPECT_EQ(kept, i == 1 ? 70 : 20);
    }
  }
}

TEST_F(Rows, AskForSharedMemoryOnceOnEachDevice) {
  Sample<BFloat16> sample({1, 200}, Formula::cosp_exact, Values::spread);
  const auto launches = [&](int device) {
    simt::settings.device = device;
    const int before = simt::shared_limit_changes;
    float threshold = 0.0f;
    for (int n = 0; n < 3; ++n) {
      EXPECT_EQ(launch_prune_rows(sample.arguments(), 100, &threshold, nullptr, 1, nullptr), cudaSuccess);
    }
    return simt::shared_limit_changes - before;
  };
  launches(0);
  EXPECT_EQ(launches(0), 0);
  EXPECT_EQ(launches(1), 1);
  EXPECT_EQ(launches(1), 0);
}

TEST_F(Rows, ExtremeScoresKeepTheirOrder) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    Sample<float> got({1, 9}, Formula::given, Values::spread);
    std::vector<float> moment{3.4e38f, -3.4e38f, 0.0f, -0.0f, 1e-45f, -1e-45f, 1.0f, -1.0f, 3.4e38f};
    ScoredArguments arguments = got.arguments();
    arguments.moment = moment.data();
    for (int64_t j = 0; j < 9; ++j) got.weight(0, j) = 1.0f;
    float threshold = -1.0f;
    ASSERT_EQ(launch_prune_rows(arguments, 5, &threshold, nullptr, 1, nullptr), cudaSuccess);
    const std::vector<float> want{1, 0, 1, 0, 1, 0, 1, 0, 1};  // the first of the two zeros
    for (int64_t j = 0; j < 9; ++j) EXPECT_EQ(got.weight(0, j), want[static_cast<size_t>(j)]) << j;
    EXPECT_EQ(bits_of(threshold), 0u);
  }
}

TEST_F(Rows, NothingToDo) {
  float threshold = 7.0f;
  Sample<float> no_rows({0, 8}, Formula::magnitude, Values::spread),
      no_columns({1, 0}, Formula::magnitude, Values::spread);
  EXPECT_EQ(launch_prune_rows(no_rows.arguments(), 3, &threshold, nullptr, 1, nullptr), cudaSuccess);
  EXPECT_EQ(launch_prune_rows(no_columns.arguments(), 0, &threshold, nullptr, 1, nullptr), cudaSuccess);
  EXPECT_EQ(threshold, 7.0f);
}

}  // namespace
}  // namespace ace::cuda
