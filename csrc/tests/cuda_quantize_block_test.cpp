// The CUDA kernels of quantize_block_ on the host, against plain loops over the same formulas.
#include "core/obs_block.h"
#include "core/quantize_block.h"
#include "cuda/quantize_block.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

template <class T>
constexpr Dtype kDtype = Dtype::float32;
template <>
constexpr Dtype kDtype<Half> = Dtype::float16;
template <>
constexpr Dtype kDtype<BFloat16> = Dtype::bfloat16;

template <class T>
struct QuantizeCase {
  Layout layout, square;  // of weight, error, mask and current; of the factor
  std::vector<float> weight, error, factor, current;
  std::vector<T> scale;
  Mask mask;
  int bits;

  QuantizeCase(Layout l, Values values, int b, bool descends) : layout(l), square{l.cols, l.cols, 1}, bits(b) {
    std::mt19937 random(4);
    for (size_t k = 0; k < layout.size(); ++k) weight.push_back(random_value<float>(random, values));
    for (size_t k = 0; k < layout.size() && descends; ++k) current.push_back(random_value<float>(random, values));
    error.assign(layout.size(), 7.0f);
    for (size_t k = 0; k < square.size(); ++k) factor.push_back(0.25f * random_value<float>(random, values));
    for (int64_t c = 0; c < l.cols; ++c) u(c, c) = values == Values::ties ? 1.0f : 1.0f + absolute(u(c, c));
    for (int64_t i = 0; i < l.rows; ++i) {
      scale.emplace_back();
      round_to(i % 5 == 4 ? 0.0f : 0.01f + absolute(random_value<float>(random, values)), &scale.back());
    }
    mask = random_mask(layout, 0, 0, random);
  }

  float& u(int64_t c, int64_t k) { return factor[static_cast<size_t>(c * square.stride() + k)]; }
  size_t at(int64_t i, int64_t k) const { return static_cast<size_t>(i * layout.stride() + k); }

  void launch(int code = 1) {
    const QuantizeArguments arguments{weight.data(),   error.data(),    mask.get(),
                                      scale.data(),    factor.data(),   current.empty() ? nullptr : current.data(),
                                      layout.rows,     layout.cols,     layout.stride(),
                                      layout.stride(), layout.stride(), square.stride(),
                                      layout.stride(), kDtype<T>,       bits};
    Workspace work(quantize_block_bytes());
    ASSERT_EQ(launch_quantize_block(arguments, work.data(), code, nullptr), cudaSuccess);
  }

  void solve_plainly() {
    const CodeRange range(bits);
    for (int64_t i = 0; i < layout.rows; ++i) {
      const float step = to_float(scale[static_cast<size_t>(i)]);
      for (int64_t c = 0; c < layout.cols; ++c) {
        const size_t n = at(i, c);
        const float value = mask[n] ? grid_value<T>(nearest_code(weight[n], step, range), step) : 0.0f;
        const float d = error[n] = obs_error(current.empty() ? weight[n] - value : value - current[n], u(c, c));
        for (int64_t k = c + 1; k < layout.cols && d != 0.0f; ++k) {
          weight[at(i, k)] = obs_correct(weight[at(i, k)], d, u(c, k));
        }
        weight[n] = value;
      }
    }
  }
};

template <class T>
void check_quantize(Layout layout, Values values, int bits, bool descends) {
  QuantizeCase<T> got(layout, values, bits, descends), want(layout, values, bits, descends);
  for (int64_t c = 1; c < layout.cols; ++c) got.u(c, c - 1) = not_finite<float>();  // below the diagonal: not read
  got.launch();
  want.solve_plainly();
  const std::string what =
      std::to_string(bits) + " bits, width " + std::to_string(layout.cols) + ", rows " + std::to_string(layout.rows);
  for (const float d : want.error) ASSERT_TRUE(is_finite(d)) << what << ": the case is of no use";
  expect_same_bits(got.weight, want.weight, what + ", weight");
  expect_same_bits(got.error, want.error, what + ", error");
  EXPECT_EQ(take_flag(), 0);
}

template <class T>
class QuantizeBlock : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};

using Scales = ::testing::Types<float, Half, BFloat16>;
TYPED_TEST_SUITE(QuantizeBlock, Scales);

TYPED_TEST(QuantizeBlock, EqualsThePlainLoop) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const Values values : {Values::spread, Values::ties}) {
      for (const bool descends : {false, true}) {
        check_quantize<TypeParam>({1, 1, 0}, values, 4, descends);
        check_quantize<TypeParam>({5, 33, 2}, values, 3, descends);
        check_quantize<TypeParam>({37, 70, 1}, values, 8, descends);
        check_quantize<TypeParam>({3, 128, 0}, values, 4, descends);
      }
    }
  }
}

TYPED_TEST(QuantizeBlock, LeavesAloneARowThatCannotBeRounded) {
  for (int part = 0; part < 3; ++part) {
    QuantizeCase<TypeParam> got({5, 40, 0}, Values::spread, 4, true), want({5, 40, 0}, Values::spread, 4, true);
    QuantizeCase<TypeParam> before({5, 40, 0}, Values::spread, 4, true);
    want.solve_plainly();
    for (QuantizeCase<TypeParam>* one : {&got, &before}) {
      if (part == 0) one->weight[one->at(2, 39)] = not_finite<float>();
      if (part == 1) one->current[one->at(2, 39)] = not_finite<float>();
      if (part == 2) round_to(-1.0f, &one->scale[2]);
    }
    got.launch(6);
    EXPECT_EQ(take_flag(), 6);
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t k = 0; k < 40; ++k) {
        const size_t n = got.at(i, k);
        EXPECT_EQ(got.error[n], i == 2 ? 7.0f : want.error[n]);
        EXPECT_EQ(bits_of(got.weight[n]), bits_of(i == 2 ? before.weight[n] : want.weight[n]));
      }
    }
  }
}

TYPED_TEST(QuantizeBlock, LeavesAllAloneWhereTheFactorIsAtFault) {
  for (const float value : {not_finite<float>(), 0.0f, -1.0f}) {
    QuantizeCase<TypeParam> got({3, 40, 0}, Values::spread, 4, false);
    const QuantizeCase<TypeParam> before({3, 40, 0}, Values::spread, 4, false);
    got.u(39, 39) = value;
    got.launch(6);
    EXPECT_EQ(take_flag(), 6);
    expect_same_bits(got.weight, before.weight, "weight");
    expect_same_bits(got.error, before.error, "error");
  }
}

}  // namespace
}  // namespace ace::cuda
