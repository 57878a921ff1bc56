// The CUDA kernels of refine_swaps_ on the host, against plain loops over the same formulas.
#include "core/swaps.h"
#include "cuda/swaps.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

// One row's search, all pairs or halves in the order of their columns.
class PlainRow {
 public:
  PlainRow(std::vector<double> weight, const std::vector<float>& gram, bool* mask)
      : weight_(std::move(weight)), gram_(gram), mask_(mask), cols_(static_cast<int64_t>(weight_.size())) {
    std::vector<double> lanes(kNormLanes);
    for (int64_t j = 0; j < cols_; ++j) lanes[static_cast<size_t>(j % kNormLanes)] += norm(j);
    row_norm_ = fold_norms(lanes.data());
    c_.resize(weight_.size());
    for (int64_t j = 0; j < cols_; ++j) {
      for (int64_t k = 0; k < cols_ && !mask_[j]; ++k) c(k) += w(j) * g(j, k);
    }
  }

  int64_t refine(int group_m, int64_t max_swaps) {
    for (int64_t made = 0; made < max_swaps; ++made) {
      int64_t restored = -1, removed = -1;
      const double change = group_m > 0 ? find_pair(group_m, &restored, &removed) : find(&restored, &removed);
      if (restored < 0 || removed < 0) return made;
      if (!(change < -swap_rounding(norm(restored) + norm(removed), row_norm_, cols_, made))) return made;
      for (int64_t k = 0; k < cols_; ++k) c(k) = c(k) + w(removed) * g(removed, k) - w(restored) * g(restored, k);
      std::swap(mask_[restored], mask_[removed]);
    }
    return max_swaps;
  }

 private:
  double w(int64_t j) const { return weight_[static_cast<size_t>(j)]; }
  double& c(int64_t j) { return c_[static_cast<size_t>(j)]; }
  double g(int64_t i, int64_t j) const { return static_cast<double>(gram_[static_cast<size_t>(i * cols_ + j)]); }
  double norm(int64_t j) const { return output_norm(w(j), diagonal_root(g(j, j))); }
  double restore(int64_t j) { return loss_change(-w(j), c(j), g(j, j)); }
  double remove(int64_t i, int64_t restored) { return loss_change(w(i), c(i) - w(restored) * g(restored, i), g(i, i)); }

  double find(int64_t* restored, int64_t* removed) {
    double gain = 1e300, cost = 1e300;
    for (int64_t j = 0; j < cols_; ++j) {
      if (!mask_[j] && restore(j) < gain) gain = restore(*restored = j);
    }
    for (int64_t i = 0; i < cols_ && *restored >= 0; ++i) {
      if (mask_[i] && remove(i, *restored) < cost) cost = remove(*removed = i, *restored);
    }
    return gain + cost;
  }

  double find_pair(int group_m, int64_t* restored, int64_t* removed) {
    double least = 1e300;
    for (int64_t j = 0; j < cols_; ++j) {
      for (int64_t i = j / group_m * group_m; i < (j / group_m + 1) * group_m; ++i) {
        if (mask_[j] || !mask_[i] || !(restore(j) + remove(i, j) < least)) continue;
        least = restore(*restored = j) + remove(*removed = i, j);
      }
    }
    return least;
  }

  std::vector<double> weight_, c_;
  const std::vector<float>& gram_;
  bool* mask_;
  int64_t cols_;
  double row_norm_ = 0.0;
};

template <class T>
struct SwapCase {
  Sample<T> weight;
  Layout layout;  // of the mask
  std::vector<float> gram;
  Mask mask;
  int keep_n, group_m;
  int64_t max_swaps;

  SwapCase(Shape shape, Values values, int n, int m, int64_t most = 100)
      : weight(shape, Formula::magnitude, values),
        layout{shape.rows, shape.cols, 3},
        keep_n(n),
        group_m(m),
        max_swaps(most) {
    std::mt19937 random(3);
    gram = random_gram(shape.cols, 9, values, random);
    mask = random_mask(layout, n, m, random);
  }

  std::vector<int64_t> launch(int code = 1) {
    const SwapArguments arguments{&weight.weight(0, 0), mask.get(),      gram.data(), layout.rows, layout.cols,
                                  weight.stride(),      layout.stride(), max_swaps,   keep_n,      group_m,
                                  dtype_of<T>()};
    size_t bytes = 0;
    EXPECT_EQ(refine_swaps_bytes(arguments, &bytes), cudaSuccess);
    Workspace work(bytes);
    std::vector<int64_t> swaps(static_cast<size_t>(layout.rows), -7);
    EXPECT_EQ(launch_refine_swaps(arguments, swaps.data(), work.data(), code, nullptr), cudaSuccess);
    return swaps;
  }
};

template <class T>
void check_swaps(SwapCase<T>&& got) {
  const Mask want = copy_of(got.mask, got.layout);
  std::vector<int64_t> swaps;
  for (int64_t i = 0; i < got.layout.rows; ++i) {
    std::vector<double> row;
    for (int64_t j = 0; j < got.layout.cols; ++j) row.push_back(static_cast<double>(to_float(got.weight.weight(i, j))));
    swaps.push_back(PlainRow(row, got.gram, want.get() + i * got.layout.stride()).refine(got.group_m, got.max_swaps));
  }
  const std::string what = std::to_string(got.layout.cols) + " columns, groups of " + std::to_string(got.group_m);
  EXPECT_EQ(got.launch(), swaps) << what;
  expect_same_masks(got.mask, want, got.layout, what);
  EXPECT_EQ(take_flag(), 0);
}

template <class T>
class SwapsOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(SwapsOf, Dtypes);

TYPED_TEST(SwapsOf, EqualThePlainSearch) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Values values : {Values::spread, Values::ties}) {
      check_swaps(SwapCase<TypeParam>({2, 1}, values, 0, 0));
      check_swaps(SwapCase<TypeParam>({3, 40, 5, 1}, values, 0, 0));
      check_swaps(SwapCase<TypeParam>({3, 40, 5, 1}, values, 2, 4));
      check_swaps(SwapCase<TypeParam>({2, 35}, values, 3, 7));
      check_swaps(SwapCase<TypeParam>({2, 64}, values, 11, 32));
    }
  }
}

TYPED_TEST(SwapsOf, TakeRowsWiderThanTheBlock) {
  check_swaps(SwapCase<TypeParam>({2, 300}, Values::spread, 0, 0, 7));
  check_swaps(SwapCase<TypeParam>({1, 1100}, Values::spread, 2, 4, 3));
}

TYPED_TEST(SwapsOf, HappenAndEnd) {
  SwapCase<TypeParam> one({3, 40}, Values::spread, 0, 0, 1), all({3, 40}, Values::spread, 0, 0);
  EXPECT_EQ(one.launch(), (std::vector<int64_t>{1, 1, 1}));
  for (const int64_t swaps : all.launch()) {
    EXPECT_GT(swaps, 1);
    EXPECT_LT(swaps, 100);
  }
}

TYPED_TEST(SwapsOf, LeaveAloneWhatTheyCannotUse) {
  SwapCase<TypeParam> weight({3, 40}, Values::spread, 2, 4), pattern({3, 40}, Values::spread, 2, 4),
      gram({3, 40}, Values::spread, 2, 4);
  weight.weight.weight(1, 39) = not_finite<TypeParam>();
  std::fill_n(pattern.mask.get() + pattern.layout.stride() + 36, 4, true);
  gram.gram[40 * 39 + 7] = not_finite<float>();
  for (SwapCase<TypeParam>* one : {&weight, &pattern}) {
    const Mask before = copy_of(one->mask, one->layout);
    const std::vector<int64_t> swaps = one->launch(5);
    EXPECT_EQ(take_flag(), 5);
    EXPECT_GT(swaps[0], 0);
    EXPECT_EQ(swaps[1], -1);
    EXPECT_GT(swaps[2], 0);
    for (int64_t j = 43; j < 2 * 43; ++j) EXPECT_EQ(one->mask[j], before[j]);
  }
  const Mask before = copy_of(gram.mask, gram.layout);
  EXPECT_EQ(gram.launch(5), (std::vector<int64_t>{-1, -1, -1}));
  EXPECT_EQ(take_flag(), 5);
  expect_same_masks(gram.mask, before, gram.layout, "gram");
}

}  // namespace
}  // namespace ace::cuda
