// refine_swaps_ and obs_block_ by the CUDA kernels' source on the host, against plain loops over the same formulas.
#include <memory>

#include "core/obs_block.h"
#include "core/swaps.h"
#include "cuda/obs_block.h"
#include "cuda/swaps.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

using Mask = std::unique_ptr<bool[]>;

// Rows of a matrix of cols + padding columns.
struct Layout {
  int64_t rows, cols, padding;
  int64_t stride() const { return cols + padding; }
  size_t size() const { return static_cast<size_t>(rows * stride()); }
};

// keep_n of each group_m, or half of each row, in a shuffled order; false in the padding.
Mask random_mask(const Layout& layout, int keep_n, int group_m, std::mt19937& random) {
  Mask mask(new bool[layout.size() + 1]());
  const int64_t group = group_m > 0 ? group_m : layout.cols, keep = group_m > 0 ? keep_n : layout.cols / 2;
  for (int64_t i = 0; i < layout.rows; ++i) {
    for (int64_t j = 0; j < layout.cols; j += group) {
      bool* first = mask.get() + i * layout.stride() + j;
      std::fill(first, first + keep, true);
      std::shuffle(first, first + group, random);
    }
  }
  return mask;
}

Mask copy_of(const Mask& mask, const Layout& layout) {
  Mask copy(new bool[layout.size() + 1]);
  std::copy(mask.get(), mask.get() + layout.size(), copy.get());
  return copy;
}

void expect_same_masks(const Mask& got, const Mask& want, const Layout& layout, const std::string& what) {
  for (size_t n = 0; n < layout.size(); ++n) ASSERT_EQ(got[n], want[n]) << what << ", entry " << n;
}

// X^T X of `tokens` random inputs; symmetric to the bit.
std::vector<float> random_gram(int64_t cols, int64_t tokens, Values values, std::mt19937& random) {
  std::vector<float> x, gram(static_cast<size_t>(cols * cols));
  for (int64_t n = 0; n < tokens * cols; ++n) x.push_back(random_value<float>(random, values));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        gram[static_cast<size_t>(i * cols + j)] +=
            x[static_cast<size_t>(t * cols + i)] * x[static_cast<size_t>(t * cols + j)];
      }
    }
  }
  return gram;
}

// --- refine_swaps_ ---

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
class SolversOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(SolversOf, Dtypes);

TYPED_TEST(SolversOf, SwapsEqualThePlainSearch) {
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

TYPED_TEST(SolversOf, SwapsOfRowsWiderThanTheBlock) {
  check_swaps(SwapCase<TypeParam>({2, 300}, Values::spread, 0, 0, 7));
  check_swaps(SwapCase<TypeParam>({1, 1100}, Values::spread, 2, 4, 3));
}

TYPED_TEST(SolversOf, SwapsHappenAndEnd) {
  SwapCase<TypeParam> one({3, 40}, Values::spread, 0, 0, 1), all({3, 40}, Values::spread, 0, 0);
  EXPECT_EQ(one.launch(), (std::vector<int64_t>{1, 1, 1}));
  for (const int64_t swaps : all.launch()) {
    EXPECT_GT(swaps, 1);
    EXPECT_LT(swaps, 100);
  }
}

TYPED_TEST(SolversOf, SwapsLeaveAloneWhatTheyCannotUse) {
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

// --- obs_block_ ---

struct ObsCase {
  Layout layout, square;  // of weight, error and mask; of the factor
  std::vector<float> weight, error, factor;
  Mask mask;
  int keep_n, group_m;

  ObsCase(Layout l, Values values, int n, int m) : layout(l), square{l.cols, l.cols, 1}, keep_n(n), group_m(m) {
    std::mt19937 random(4);
    for (size_t k = 0; k < layout.size(); ++k) weight.push_back(random_value<float>(random, values));
    error.assign(layout.size(), 7.0f);
    for (size_t k = 0; k < square.size(); ++k) factor.push_back(0.25f * random_value<float>(random, values));
    for (int64_t c = 0; c < l.cols; ++c) u(c, c) = values == Values::ties ? 1.0f : 1.0f + absolute(u(c, c));
    mask = random_mask(layout, n, m, random);
  }

  float& u(int64_t c, int64_t k) { return factor[static_cast<size_t>(c * square.stride() + k)]; }
  size_t at(int64_t i, int64_t k) const { return static_cast<size_t>(i * layout.stride() + k); }

  void launch(int code = 1) {
    const ObsArguments arguments{weight.data(),   error.data(),    mask.get(),      factor.data(),
                                 layout.rows,     layout.cols,     layout.stride(), layout.stride(),
                                 layout.stride(), square.stride(), keep_n,          group_m};
    Workspace work(obs_block_bytes());
    ASSERT_EQ(launch_obs_block(arguments, work.data(), code, nullptr), cudaSuccess);
  }

  void solve_plainly() {
    for (int64_t i = 0; i < layout.rows; ++i) {
      for (int64_t c = 0; c < layout.cols; ++c) {
        if (group_m > 0 && c % group_m == 0) choose(i, c);
        const bool kept = mask[at(i, c)];
        const float d = error[at(i, c)] = kept ? 0.0f : obs_error(weight[at(i, c)], u(c, c));
        for (int64_t k = c + 1; k < layout.cols && d != 0.0f; ++k) {
          weight[at(i, k)] = obs_correct(weight[at(i, k)], d, u(c, k));
        }
        if (!kept) weight[at(i, c)] = 0.0f;
      }
    }
  }

  void choose(int64_t i, int64_t first) {
    uint32_t keys[kMaxGroup];
    for (int g = 0; g < group_m; ++g) keys[g] = obs_key(weight[at(i, first + g)], u(first + g, first + g));
    const uint32_t kept = keep_best<0>(keys, group_m, keep_n);
    for (int g = 0; g < group_m; ++g) mask[at(i, first + g)] = (kept >> g & 1u) != 0;
  }
};

void check_obs(Layout layout, Values values, int keep_n, int group_m) {
  ObsCase got(layout, values, keep_n, group_m), want(layout, values, keep_n, group_m);
  for (int64_t c = 1; c < layout.cols; ++c) got.u(c, c - 1) = not_finite<float>();  // below the diagonal: not read
  got.launch();
  want.solve_plainly();
  const std::string what = std::to_string(keep_n) + ":" + std::to_string(group_m) + ", width " +
                           std::to_string(layout.cols) + ", rows " + std::to_string(layout.rows);
  for (const float d : want.error) ASSERT_TRUE(is_finite(d)) << what << ": the case is of no use";
  expect_same_bits(got.weight, want.weight, what + ", weight");
  expect_same_bits(got.error, want.error, what + ", error");
  expect_same_masks(got.mask, want.mask, layout, what);
  EXPECT_EQ(take_flag(), 0);
}

class Solvers : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TEST_F(Solvers, RecursionEqualsThePlainLoop) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Values values : {Values::spread, Values::ties}) {
      check_obs({1, 1, 0}, values, 0, 0);
      check_obs({5, 33, 2}, values, 0, 0);
      check_obs({37, 70, 1}, values, 0, 0);
      check_obs({3, 128, 0}, values, 0, 0);
    }
  }
}

TEST_F(Solvers, RecursionChoosesPatterns) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int group_m : {1, 2, 4, 5, 7, 17, 32}) {
      if (!kThorough && group_m > 5) continue;
      for (const int keep_n : {0, group_m / 2, group_m}) {
        check_obs({3, int64_t{3} * group_m, 1}, Values::spread, keep_n, group_m);
        check_obs({2, int64_t{20} * group_m, 0}, Values::ties, keep_n, group_m);
      }
    }
  }
}

TEST_F(Solvers, RecursionLeavesAloneARowThatIsNotFinite) {
  ObsCase got({5, 40, 0}, Values::spread, 2, 4), want({5, 40, 0}, Values::spread, 2, 4);
  ObsCase before({5, 40, 0}, Values::spread, 2, 4);
  want.solve_plainly();
  for (ObsCase* one : {&got, &before}) one->weight[one->at(2, 39)] = not_finite<float>();
  got.launch(6);
  EXPECT_EQ(take_flag(), 6);
  for (int64_t i = 0; i < 5; ++i) {
    for (int64_t k = 0; k < 40; ++k) {
      const size_t n = got.at(i, k);
      EXPECT_EQ(got.error[n], i == 2 ? 7.0f : want.error[n]);
      EXPECT_EQ(got.mask[n], i == 2 ? before.mask[n] : want.mask[n]);
      EXPECT_EQ(bits_of(got.weight[n]), bits_of(i == 2 ? before.weight[n] : want.weight[n]));
    }
  }
}

TEST_F(Solvers, RecursionLeavesAllAloneWhereTheFactorIsAtFault) {
  for (const float value : {not_finite<float>(), 0.0f, -1.0f}) {
    ObsCase got({3, 40, 0}, Values::spread, 0, 0);
    const ObsCase before({3, 40, 0}, Values::spread, 0, 0);
    got.u(39, 39) = value;
    got.launch(6);
    EXPECT_EQ(take_flag(), 6);
    expect_same_bits(got.weight, before.weight, "weight");
    expect_same_bits(got.error, before.error, "error");
  }
}

}  // namespace
}  // namespace ace::cuda
