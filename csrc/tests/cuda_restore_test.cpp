// The CUDA kernel of restore_mean_ on the host, against plain loops over the same formulas.
#include "core/restore.h"
#include "cuda/restore.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

struct RestoreCase {
  Sample<float> weight;
  Layout layout;  // of the mask
  std::vector<float> mean, direction;
  Mask mask;

  explicit RestoreCase(Shape shape, Values values = Values::spread)
      : weight(shape, Formula::magnitude, values), layout{shape.rows, shape.cols, 3} {
    std::mt19937 random(3);
    for (int64_t j = 0; j < shape.cols; ++j) {
      mean.push_back(random_value<float>(random, values));
      direction.push_back(mean.back() * absolute(random_value<float>(random, values)));
    }
    mask = random_mask(layout, 0, 0, random);
  }

  void launch(int code = 1) {
    const RestoreArguments arguments{&weight.weight(0, 0), mask.get(),  mean.data(),     direction.data(),
                                     layout.rows,          layout.cols, weight.stride(), layout.stride()};
    EXPECT_EQ(launch_restore_mean(arguments, code, nullptr), cudaSuccess);
  }

  std::vector<float> expected(int64_t i) {
    double shift[kLanes] = {}, gain[kLanes] = {};
    const bool* kept = mask.get() + i * layout.stride();
    const auto at = [](int64_t j) { return static_cast<size_t>(j); };
    for (int64_t j = 0; j < layout.cols; ++j) {
      const RestoreTerms terms =
          restore_terms(kept[j] ? 0.0f : weight.weight(i, j), mean[at(j)], kept[j] ? direction[at(j)] : 0.0f);
      shift[j % kLanes] += terms.shift;
      gain[j % kLanes] += terms.gain;
    }
    const double scale = restore_scale(fold_lanes(shift), fold_lanes(gain));
    std::vector<float> row;
    for (int64_t j = 0; j < layout.cols; ++j) {
      row.push_back(kept[j] ? restored_weight(weight.weight(i, j), direction[at(j)], scale) : 0.0f);
    }
    return row;
  }

  std::vector<float> row(int64_t i) {
    std::vector<float> values;
    for (int64_t j = 0; j < layout.cols; ++j) values.push_back(weight.weight(i, j));
    return values;
  }
};

class Restore : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

void expect_same_bits(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t j = 0; j < got.size(); ++j) ASSERT_EQ(float_bits(got[j]), float_bits(want[j])) << "column " << j;
}

TEST_F(Restore, EqualsPlainLoops) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Values values : {Values::spread, Values::ties}) {
      for (const Shape shape : {Shape{2, 1}, Shape{3, 40, 5, 1}, Shape{9, 33}, Shape{1, 1100}}) {
        RestoreCase one(shape, values);
        std::vector<std::vector<float>> want;
        for (int64_t i = 0; i < shape.rows; ++i) want.push_back(one.expected(i));
        one.launch();
        for (int64_t i = 0; i < shape.rows; ++i) expect_same_bits(one.row(i), want[static_cast<size_t>(i)]);
        EXPECT_EQ(take_flag(), 0);
      }
    }
  }
}

TEST_F(Restore, KeepsTheMeanWhereTheDirectionIsSteep) {
  RestoreCase one({1, 4});
  one.mean = {1.0f, 2.0f, -1.0f, 0.5f};
  one.direction = {0.0f, 2.0e9f, 0.0f, 0.0f};  // one column that hardly varies compensates nearly everything
  const bool kept[] = {false, true, true, false};
  std::copy(kept, kept + 4, one.mask.get());
  const float weight[] = {3.0f, 1.0f, 5.0f, -2.0f};
  for (int64_t j = 0; j < 4; ++j) one.weight.weight(0, j) = weight[j];
  one.launch();
  EXPECT_EQ(one.row(0), (std::vector<float>{0.0f, 2.0f, 5.0f, 0.0f}));
}

TEST_F(Restore, LeavesAloneWhatItCannotUse) {
  RestoreCase weight({3, 40});
  weight.weight.weight(1, 39) = not_finite<float>();
  const std::vector<float> first = weight.expected(0), before = weight.row(1), last = weight.expected(2);
  weight.launch(5);
  EXPECT_EQ(take_flag(), 5);
  expect_same_bits(weight.row(0), first);
  expect_same_bits(weight.row(1), before);
  expect_same_bits(weight.row(2), last);
  for (const bool of_mean : {false, true}) {
    RestoreCase vector({2, 40});
    (of_mean ? vector.mean : vector.direction)[7] = not_finite<float>();
    const std::vector<float> untouched = vector.row(1);
    vector.launch(6);
    EXPECT_EQ(take_flag(), 6);
    expect_same_bits(vector.row(1), untouched);
  }
  RestoreCase sign({1, 40});
  sign.mean[3] = 1.0f;
  sign.direction[3] = -1.0f;
  const std::vector<float> untouched = sign.row(0);
  sign.launch(7);
  EXPECT_EQ(take_flag(), 7);
  expect_same_bits(sign.row(0), untouched);
}

}  // namespace
}  // namespace ace::cuda
