// The CUDA kernels of update_moments_, inverse_square_norm and the squares of update_cosine_moment_ on the host,
// against float64 sums.
#include "cuda/moments.h"
#include "tests/sample.h"

namespace ace::cuda {
namespace {

template <class T>
class MomentsOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

TYPED_TEST_SUITE(MomentsOf, Dtypes);

// [tokens, cols] with a row stride, as in Sample.
template <class T>
Activations activations(Sample<T>& x) {
  return {&x.weight(0, 0), x.rows(), x.cols(), x.stride(), dtype_of<T>()};
}

template <class Real>
struct State {
  Real weight = 0;
  std::vector<Real> mean, m2;
  explicit State(int64_t cols) : mean(static_cast<size_t>(cols)), m2(static_cast<size_t>(cols)) {}
};

template <class T, class Real>
void update(State<Real>& state, Sample<T>& x, const float* token_weight) {
  const Activations tokens = activations(x);
  size_t bytes = 0;
  ASSERT_EQ(update_moments_bytes(tokens, &bytes), cudaSuccess);
  Workspace work(bytes);
  ASSERT_EQ(launch_update_moments(tokens, token_weight, std::is_same_v<Real, double>, &state.weight, state.mean.data(),
                                  state.m2.data(), work.data(), 2, nullptr),
            cudaSuccess);
}

std::vector<float> token_weights(int64_t tokens) {
  std::mt19937 random(3);
  std::vector<float> weights;
  for (int64_t t = 0; t < tokens; ++t)
    weights.push_back(t % 5 == 0 ? 0.0f : absolute(random_value<float>(random, Values::spread)));
  return weights;
}

template <class T, class Real>
void check_moments(Shape shape, bool weighted) {
  Sample<T> x(shape, Formula::magnitude, Values::spread), more({13, shape.cols}, Formula::magnitude, Values::spread, 9);
  const std::vector<float> weights = token_weights(shape.rows);
  State<Real> state(shape.cols), again(shape.cols);
  for (State<Real>* s : {&state, &again}) {
    update(*s, x, weighted ? weights.data() : nullptr);
    update(*s, more, nullptr);
  }
  expect_same_bits(state.mean, again.mean, "two runs");
  expect_same_bits(state.m2, again.m2, "two runs");
  double total = 13.0;
  for (int64_t t = 0; t < shape.rows; ++t) total += weighted ? weights[static_cast<size_t>(t)] : 1.0;
  EXPECT_NEAR(static_cast<double>(state.weight), total, 1e-6 * total);
  for (int64_t j = 0; j < shape.cols; ++j) {
    const auto each = [&](auto&& visit) {
      for (int64_t t = 0; t < shape.rows; ++t) {
        visit(static_cast<double>(to_float(x.weight(t, j))), weighted ? weights[static_cast<size_t>(t)] : 1.0);
      }
      for (int64_t t = 0; t < 13; ++t) visit(static_cast<double>(to_float(more.weight(t, j))), 1.0);
    };
    double mean = 0.0, m2 = 0.0;
    each([&](double value, double weight) { mean += weight * value / total; });
    each([&](double value, double weight) { m2 += weight * (value - mean) * (value - mean); });
    ASSERT_NEAR(static_cast<double>(state.mean[static_cast<size_t>(j)]), mean, 2e-6) << j;
    ASSERT_NEAR(static_cast<double>(state.m2[static_cast<size_t>(j)]), m2, 4e-6 * m2 + 1e-9) << j;
  }
  EXPECT_EQ(take_flag(), 0);
}

TYPED_TEST(MomentsOf, MatchFloat64Sums) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const bool weighted : {false, true}) {
      check_moments<TypeParam, float>({1, 1}, weighted);
      check_moments<TypeParam, double>({2, 257}, weighted);
      check_moments<TypeParam, float>({131, 33, 3}, weighted);
      check_moments<TypeParam, double>({200, 24}, weighted);
    }
  }
}

TYPED_TEST(MomentsOf, MoreStripsThanBlocks) {
  simt::settings.processors = 1;
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    check_moments<TypeParam, float>({70, 1100}, false);
  }
}

TYPED_TEST(MomentsOf, SurviveALargeMean) {
  // 1,000 times the spread; Sample's weights only give the shape.
  Sample<float> x({300, 8}, Formula::magnitude, Values::spread);
  for (int64_t t = 0; t < 300; ++t) {
    for (int64_t j = 0; j < 8; ++j) x.weight(t, j) = 1000.0f + static_cast<float>((t * 7 + j) % 11 - 5) * 0.25f;
  }
  State<double> state(8);
  update(state, x, nullptr);
  for (int64_t j = 0; j < 8; ++j) {
    double mean = 0.0, m2 = 0.0;
    for (int64_t t = 0; t < 300; ++t) mean += static_cast<double>(x.weight(t, j)) / 300.0;
    for (int64_t t = 0; t < 300; ++t) m2 += std::pow(static_cast<double>(x.weight(t, j)) - mean, 2.0);
    EXPECT_NEAR(state.mean[static_cast<size_t>(j)], mean, 2e-4);
    EXPECT_NEAR(state.m2[static_cast<size_t>(j)], m2, 1e-4 * m2);
  }
}

// Deviations are summed about the current mean. A first token far from all others, as in language models, or padding
// before a large mean must not cause cancellation.
TYPED_TEST(MomentsOf, TheFirstTokenIsNoGuide) {
  for (const bool padded : {false, true}) {
    Sample<float> x({600, 8}, Formula::magnitude, Values::spread);
    std::vector<float> weights(600, 1.0f);
    for (int64_t t = 0; t < 600; ++t) {
      for (int64_t j = 0; j < 8; ++j) {
        x.weight(t, j) = (padded ? 1000.0f : 0.0f) + static_cast<float>((t * 7 + j) % 11 - 5) * 0.25f;
        if (t < 9) weights[static_cast<size_t>(t)] = padded ? 0.0f : 1.0f;
        if (t == 0) x.weight(t, j) = 3000.0f;
      }
    }
    State<double> state(8);
    update(state, x, weights.data());
    for (int64_t j = 0; j < 8; ++j) {
      double mean = 0.0, m2 = 0.0;
      const int64_t first = padded ? 9 : 0;
      for (int64_t t = first; t < 600; ++t)
        mean += static_cast<double>(x.weight(t, j)) / static_cast<double>(600 - first);
      for (int64_t t = first; t < 600; ++t) m2 += std::pow(static_cast<double>(x.weight(t, j)) - mean, 2.0);
      EXPECT_NEAR(state.mean[static_cast<size_t>(j)], mean, 2e-7 * mean + 1e-6);
      EXPECT_NEAR(state.m2[static_cast<size_t>(j)], m2, 2e-6 * m2);
    }
  }
}

TYPED_TEST(MomentsOf, NoTokensNoColumns) {
  Sample<TypeParam> no_tokens({0, 8}, Formula::magnitude, Values::spread),
      no_columns({3, 0}, Formula::magnitude, Values::spread);
  State<float> state(8), empty(0);
  update(state, no_tokens, nullptr);
  update(empty, no_columns, nullptr);
  EXPECT_EQ(state.weight, 0.0f);
  EXPECT_EQ(empty.weight, 3.0f);
}

TYPED_TEST(MomentsOf, TokensOfWeightZeroMayHoldAnything) {
  Sample<TypeParam> x({40, 8}, Formula::magnitude, Values::spread);
  std::vector<float> weights(40, 1.0f);
  weights[3] = 0.0f;
  State<double> clean(8), padded(8);
  update(clean, x, weights.data());
  for (int64_t j = 0; j < 8; ++j) x.weight(3, j) = not_finite<TypeParam>();
  update(padded, x, weights.data());
  expect_same_bits(padded.m2, clean.m2, "weight 0");
  EXPECT_EQ(take_flag(), 0);
}

TYPED_TEST(MomentsOf, WrongInputRaisesTheFlag) {
  Sample<TypeParam> x({40, 8}, Formula::magnitude, Values::spread);
  std::vector<float> weights(40, 1.0f);
  weights[39] = -1.0f;
  State<float> state(8);
  update(state, x, weights.data());
  EXPECT_EQ(take_flag(), 2);
  x.weight(39, 7) = not_finite<TypeParam>();
  update(state, x, nullptr);
  EXPECT_EQ(take_flag(), 2);
}

// Scores are float, so a float64 state beyond the range of float is invalid too.
TYPED_TEST(MomentsOf, AStateBeyondFloatRaisesTheFlag) {
  Sample<TypeParam> x({5, 8}, Formula::magnitude, Values::spread);
  State<double> state(8);
  state.weight = 1.0;
  state.m2[3] = 1e39;
  update(state, x, nullptr);
  EXPECT_EQ(take_flag(), 2);
}

TYPED_TEST(MomentsOf, InverseSquareNorms) {
  for (const Shape shape : {Shape{5, 1}, Shape{9, 257}, Shape{20, 64, 3}}) {
    Sample<TypeParam> a(shape, Formula::magnitude, Values::spread);
    for (int64_t j = 0; j < shape.cols; ++j) a.weight(2, j) = TypeParam{};
    std::vector<float> r(static_cast<size_t>(shape.rows), -1.0f);
    ASSERT_EQ(launch_inverse_square_norm(activations(a), r.data(), 6, nullptr), cudaSuccess);
    for (int64_t t = 0; t < shape.rows; ++t) {
      double sum = 0.0;
      for (int64_t j = 0; j < shape.cols; ++j) sum += std::pow(static_cast<double>(to_float(a.weight(t, j))), 2.0);
      const double want = t == 2 ? 0.0 : 1.0 / sum;
      EXPECT_NEAR(r[static_cast<size_t>(t)], want, 1e-6 * want) << t;
    }
    EXPECT_EQ(take_flag(), 0);
    a.weight(1, 0) = not_finite<TypeParam>();
    ASSERT_EQ(launch_inverse_square_norm(activations(a), r.data(), 6, nullptr), cudaSuccess);
    EXPECT_EQ(take_flag(), 6);
  }
}

TYPED_TEST(MomentsOf, ScaledSquaresAreWithinTheirRounding) {
  for (const Shape shape : {Shape{3, 5}, Shape{4, 2056}, Shape{7, 64, 3}}) {
    Sample<TypeParam> v(shape, Formula::magnitude, Values::spread);
    std::vector<float> r;
    for (int64_t t = 0; t < shape.rows; ++t) r.push_back(static_cast<float>(t) * 1e-4f);
    std::vector<BFloat16> out(static_cast<size_t>(shape.rows * shape.cols) + 8);
    ASSERT_EQ(launch_scaled_squares(activations(v), r.data(), out.data(), nullptr), cudaSuccess);
    for (int64_t n = 0; n < shape.rows * shape.cols; ++n) {
      const double value = static_cast<double>(to_float(v.weight(n / shape.cols, n % shape.cols)));
      const double want = static_cast<double>(r[static_cast<size_t>(n / shape.cols)]) * value * value;
      ASSERT_NEAR(to_float(out[static_cast<size_t>(n)]), want, 0.0039063 * want) << n;  // 2^-8 (1 + 2^-14)
    }
  }
}

// inverse_square_norm raises the flag for it; until then the product must not treat it as zero.
TYPED_TEST(MomentsOf, ASquareThatIsNaNStaysOne) {
  Sample<TypeParam> v({1, 8}, Formula::magnitude, Values::spread);
  const float r = bits_float(0x7fffffffu);  // a GPU's NaN
  std::vector<BFloat16> out(8);
  ASSERT_EQ(launch_scaled_squares(activations(v), &r, out.data(), nullptr), cudaSuccess);
  for (const BFloat16 square : out) EXPECT_TRUE(std::isnan(to_float(square)));
}

}  // namespace
}  // namespace ace::cuda
