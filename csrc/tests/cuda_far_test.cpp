// Rows that are more than 2^31 values apart, as in a view: an address computed in 32 bits would miss them. The pages
// between the rows are never touched, so they use no memory.
#include <sys/mman.h>

#include "cuda/mask.h"
#include "cuda/moments.h"
#include "cuda/prune.h"
#include "cuda/score.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

constexpr int64_t kRows = 3, kCols = 136;
constexpr int64_t kFar = (int64_t{1} << 31) + 8;  // the row stride in values; whole packs

template <class T>
class FarApart {
 public:
  explicit FarApart(Sample<T>& near) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(memory);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kCols; ++j) data_[i * kFar + j] = near.weight(i, j);
    }
  }
  ~FarApart() { munmap(data_, kBytes); }
  FarApart(const FarApart&) = delete;
  FarApart& operator=(const FarApart&) = delete;

  T* data() { return data_; }

  void expect_rows_of(Sample<T>& near) const {
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kCols; ++j) {
        ASSERT_EQ(bits_of(data_[i * kFar + j]), bits_of(near.weight(i, j))) << "row " << i << ", column " << j;
      }
    }
  }

 private:
  static constexpr size_t kBytes = static_cast<size_t>(kFar * kRows) * sizeof(T);
  T* data_;
};

template <class T>
class Far : public ::testing::Test {
 protected:
  // Runs launch(arguments) on adjacent rows and on rows far apart, and expects the same weights.
  template <class Launch>
  void expect_same(Formula formula, Launch&& launch) {
    Sample<T> near({kRows, kCols}, formula, Values::spread);
    FarApart<T> far(near);
    ScoredArguments arguments = near.arguments();
    ASSERT_EQ(launch(arguments), cudaSuccess);
    arguments.weight = far.data();
    arguments.stride = kFar;
    ASSERT_EQ(launch(arguments), cudaSuccess);
    far.expect_rows_of(near);
  }
};

TYPED_TEST_SUITE(Far, Dtypes);

TYPED_TEST(Far, TopKOfRows) {
  this->expect_same(Formula::ria, [](const ScoredArguments& arguments) {
    std::vector<float> threshold(kRows);
    Workspace sums(score_sums_bytes(arguments));
    return launch_prune_rows(arguments, kCols / 2, threshold.data(), sums.data(), 1, nullptr);
  });
}

TYPED_TEST(Far, TopKOfTheMatrix) {
  this->expect_same(Formula::scaled, [](const ScoredArguments& arguments) {
    float threshold = 0.0f;
    Workspace work(prune_matrix_bytes(arguments));
    return launch_prune_matrix(arguments, kRows * kCols / 2, &threshold, work.data(), nullptr, 1, nullptr);
  });
}

TYPED_TEST(Far, GroupsOfFourAndOfSeventeen) {
  for (const int group_m : {4, 17}) {
    this->expect_same(Formula::cosp, [&](const ScoredArguments& arguments) {
      return launch_prune_nm(arguments, 2, group_m, nullptr, 1, nullptr);
    });
  }
}

TYPED_TEST(Far, Scores) {
  Sample<TypeParam> near({kRows, kCols}, Formula::scaled, Values::spread);
  FarApart<TypeParam> far(near);
  ScoredArguments arguments = near.arguments();
  arguments.weight = far.data();
  arguments.stride = kFar;
  std::vector<float> got(static_cast<size_t>(kRows * kCols));
  ASSERT_EQ(launch_score(arguments, got.data(), nullptr, 1, nullptr), cudaSuccess);
  expect_same_bits(got, near.scores(), "scores");
}

TYPED_TEST(Far, Moments) {
  Sample<TypeParam> near({kRows, kCols}, Formula::magnitude, Values::spread);
  FarApart<TypeParam> far(near);
  Activations x{&near.weight(0, 0), kRows, kCols, kCols, dtype_of<TypeParam>()};
  std::vector<double> state[2];
  std::vector<BFloat16> squares[2];
  for (const int place : {0, 1}) {
    std::vector<double> mean(kCols), m2(kCols);
    std::vector<float> r(kRows);
    squares[place].resize(static_cast<size_t>(kRows * kCols));
    double weight = 0.0;
    size_t bytes = 0;
    ASSERT_EQ(update_moments_bytes(x, &bytes), cudaSuccess);
    Workspace work(bytes);
    ASSERT_EQ(launch_update_moments(x, nullptr, true, &weight, mean.data(), m2.data(), work.data(), 1, nullptr),
              cudaSuccess);
    ASSERT_EQ(launch_inverse_square_norm(x, r.data(), 1, nullptr), cudaSuccess);
    ASSERT_EQ(launch_scaled_squares(x, r.data(), squares[place].data(), nullptr), cudaSuccess);
    state[place] = mean;
    state[place].insert(state[place].end(), m2.begin(), m2.end());
    x.data = far.data();
    x.stride = kFar;
  }
  expect_same_bits(state[1], state[0], "moments");
  expect_same_bits(squares[1], squares[0], "squares");
}

}  // namespace
}  // namespace ace::cuda
