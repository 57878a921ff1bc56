// The grid of quantize_block_.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/quantize_block.h"

namespace ace {
namespace {

TEST(NearestCode, RoundsToNearestTiesToEven) {
  const CodeRange range(4);
  for (int eighth = -80; eighth <= 80; ++eighth) {
    const float weight = static_cast<float>(eighth) / 8.0f;
    const float expected = std::fmin(7.0f, std::fmax(-8.0f, std::nearbyint(weight)));
    EXPECT_EQ(nearest_code(weight, 1.0f, range), expected) << weight;
    EXPECT_EQ(nearest_code(weight * 0.25f, 0.25f, range), expected) << weight;
  }
}

TEST(NearestCode, StaysInTheRange) {
  for (int bits = 2; bits <= 8; ++bits) {
    const CodeRange range(bits);
    const float huge = std::numeric_limits<float>::max(), infinity = std::numeric_limits<float>::infinity();
    for (const float weight : {huge, infinity}) {
      EXPECT_EQ(nearest_code(weight, 0.5f, range), std::ldexp(1.0f, bits - 1) - 1.0f);
      EXPECT_EQ(nearest_code(-weight, 0.5f, range), -std::ldexp(1.0f, bits - 1));
    }
  }
}

TEST(NearestCode, OfAScaleOfZeroIsZero) {
  for (const float weight : {0.0f, 3.0f, -3.0f}) EXPECT_EQ(nearest_code(weight, 0.0f, CodeRange(8)), 0.0f);
}

TEST(NearestCode, KeepsNaN) {
  EXPECT_TRUE(std::isnan(nearest_code(std::numeric_limits<float>::quiet_NaN(), 1.0f, CodeRange(4))));
}

TEST(GridValue, RoundsTheProductOnceMore) {
  const float scale = to_float(to_bfloat16(0.3f));
  for (int code = -128; code < 128; ++code) {
    const float product = static_cast<float>(code) * scale;
    EXPECT_EQ(grid_value<float>(static_cast<float>(code), scale), product);
    EXPECT_EQ(grid_value<BFloat16>(static_cast<float>(code), scale), to_float(to_bfloat16(product)));
    EXPECT_EQ(grid_value<Half>(static_cast<float>(code), scale), to_float(to_half(product)));
  }
}

// A code is read back from its value: it is at most 128, and a value is off by 2^-9 at most, a quarter of a step.
TEST(GridValue, GivesItsCodeBack) {
  for (const float scale : {0.0117f, 0.3f, 1.7f}) {
    const float narrow = to_float(to_bfloat16(scale));
    for (int code = -128; code < 128; ++code) {
      const float value = grid_value<BFloat16>(static_cast<float>(code), narrow);
      EXPECT_EQ(nearest_code(value, narrow, CodeRange(8)), static_cast<float>(code));
    }
  }
}

}  // namespace
}  // namespace ace
