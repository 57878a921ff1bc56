// The CUDA kernels of quantize_block_ on the host, against plain loops over the same formulas.
#include "core/obs_block.h"
#include "core/quantize_block.h"
#include "cuda/quantize_block.h"
#include "tests/solver_sample.h"

namespace ace::cuda {
namespace {

template <class T>
struct QuantizeCase {
  QuantizeCase(Layout l, int bits, bool descends) : layout(l), square{l.cols, l.cols, 1}, bits(bits) {
    std::mt19937 random(4);
    for (size_t k = 0; k < layout.size(); ++k) weight.push_back(random_value<float>(random, Values::spread));
    error.assign(layout.size(), 7.0f);
    for (size_t k = 0; k < square.size(); ++k) factor.push_back(0.25f * random_value<float>(random, Values::spread));
    for (int64_t c = 0; c < l.cols; ++c) u(c, c) = 1.0f + absolute(u(c, c));
    mask = random_mask(layout, 0, 0, random);
    for (int64_t i = 0; i < l.rows; ++i) scale.push_back(positive(random));
    if (l.rows > 1) scale[1] = T{};  // all codes of this row are 0
    for (size_t k = 0; descends && k < layout.size(); ++k) {
      current.push_back(random_value<float>(random, Values::spread));
    }
  }

  // Some weights are beyond the grid.
  T positive(std::mt19937& random) const {
    T value;
    round_to(absolute(random_value<float>(random, Values::spread)) * 1.5f / static_cast<float>(1 << (bits - 1)),
             &value);
    return value;
  }

  float& u(int64_t c, int64_t k) { return factor[static_cast<size_t>(c * square.stride() + k)]; }
  size_t at(int64_t i, int64_t k) const { return static_cast<size_t>(i * layout.stride() + k); }

  void launch(int code = 1) {
    const int64_t stride = layout.stride();
    const QuantizeArguments arguments{weight.data(), error.data(),  mask.get(),
                                      scale.data(),  factor.data(), current.empty() ? nullptr : current.data(),
                                      layout.rows,   layout.cols,   stride,
                                      stride,        stride,        square.stride(),
                                      stride,        bits,          dtype_of<T>()};
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
        const float d = obs_error(current.empty() ? weight[n] - value : value - current[n], u(c, c));
        error[n] = d;
        weight[n] = value;
        for (int64_t k = c + 1; k < layout.cols && d != 0.0f; ++k) {
          weight[at(i, k)] = obs_correct(weight[at(i, k)], d, u(c, k));
        }
      }
    }
  }

  Layout layout, square;  // of weight, error, mask and current; of the factor
  int bits;
  std::vector<float> weight, error, factor, current;
  std::vector<T> scale;
  Mask mask;
};

template <class T>
void check_quantize(Layout layout, int bits, bool descends) {
  QuantizeCase<T> got(layout, bits, descends), want(layout, bits, descends);
  for (int64_t c = 1; c < layout.cols; ++c) got.u(c, c - 1) = not_finite<float>();  // below the diagonal: not read
  got.launch();
  want.solve_plainly();
  const std::string what = std::to_string(bits) + " bits, width " + std::to_string(layout.cols) + ", rows " +
                           std::to_string(layout.rows) + (descends ? ", descends" : "");
  for (const float d : want.error) ASSERT_TRUE(is_finite(d)) << what << ": the case is of no use";
  expect_same_bits(got.weight, want.weight, what + ", weight");
  expect_same_bits(got.error, want.error, what + ", error");
  expect_same_masks(got.mask, want.mask, layout, what);
  EXPECT_EQ(take_flag(), 0);
}

template <class T>
class QuantizeBlockOf : public ::testing::Test {
 protected:
  void TearDown() override { simt::settings = simt::Settings{}; }
};
TYPED_TEST_SUITE(QuantizeBlockOf, Dtypes);

TYPED_TEST(QuantizeBlockOf, EqualsThePlainLoop) {
  for (const unsigned order : orders()) {
    simt::settings.order = order;
    for (const bool descends : {false, true}) {
      for (const int bits : {2, 4, 8}) {
        check_quantize<TypeParam>({1, 1, 0}, bits, descends);
        check_quantize<TypeParam>({5, 33, 2}, bits, descends);
        check_quantize<TypeParam>({2, 128, 0}, bits, descends);
      }
      check_quantize<TypeParam>({37, 70, 1}, 3, descends);
    }
  }
}

TYPED_TEST(QuantizeBlockOf, LeavesAloneARowThatItCannotUse) {
  const Layout layout{7, 40, 0};
  QuantizeCase<TypeParam> got(layout, 4, true), want(layout, 4, true), before(layout, 4, true);
  want.solve_plainly();
  for (QuantizeCase<TypeParam>* one : {&got, &before}) {
    one->weight[one->at(2, 39)] = not_finite<float>();
    one->current[one->at(3, 0)] = not_finite<float>();
    one->scale[4] = not_finite<TypeParam>();
    round_to(-1.0f, &one->scale[5]);
  }
  got.launch(6);
  EXPECT_EQ(take_flag(), 6);
  for (int64_t i = 0; i < layout.rows; ++i) {
    const bool left_alone = i >= 2 && i <= 5;
    for (int64_t k = 0; k < layout.cols; ++k) {
      const size_t n = got.at(i, k);
      EXPECT_EQ(bits_of(got.error[n]), bits_of(left_alone ? 7.0f : want.error[n])) << i;
      EXPECT_EQ(bits_of(got.weight[n]), bits_of(left_alone ? before.weight[n] : want.weight[n])) << i;
    }
  }
}

TYPED_TEST(QuantizeBlockOf, LeavesAllAloneWhereTheFactorIsAtFault) {
  for (const float value : {not_finite<float>(), 0.0f, -1.0f}) {
    QuantizeCase<TypeParam> got({3, 40, 0}, 4, false);
    const QuantizeCase<TypeParam> before({3, 40, 0}, 4, false);
    got.u(39, 39) = value;
    got.launch(6);
    EXPECT_EQ(take_flag(), 6);
    expect_same_bits(got.weight, before.weight, "weight");
    expect_same_bits(got.error, before.error, "error");
  }
}

TYPED_TEST(QuantizeBlockOf, NothingToDo) {
  for (const Layout layout : {Layout{0, 5, 0}, Layout{3, 0, 0}}) {
    const QuantizeArguments arguments{nullptr, nullptr,     nullptr,     nullptr, nullptr,
                                      nullptr, layout.rows, layout.cols, 5,       5,
                                      5,       5,           5,           4,       dtype_of<TypeParam>()};
    EXPECT_EQ(launch_quantize_block(arguments, nullptr, 1, nullptr), cudaSuccess);
  }
}

}  // namespace
}  // namespace ace::cuda
