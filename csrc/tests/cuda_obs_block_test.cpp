// The CUDA kernels of obs_block_ on the host, against plain loops over the same formulas.
#include "core/obs_block.h"
#include "cuda/obs_block.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

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

class ObsBlock : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TEST_F(ObsBlock, EqualsThePlainLoop) {
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

TEST_F(ObsBlock, ChoosesPatterns) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const int group_m : {1, 2, 4, 5, 7, 17, 32}) {
      for (const int keep_n : {0, group_m / 2, group_m}) {
        check_obs({3, int64_t{3} * group_m, 1}, Values::spread, keep_n, group_m);
        check_obs({2, int64_t{20} * group_m, 0}, Values::ties, keep_n, group_m);
      }
    }
  }
}

TEST_F(ObsBlock, LeavesAloneARowThatIsNotFinite) {
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

TEST_F(ObsBlock, LeavesAllAloneWhereTheFactorIsAtFault) {
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
