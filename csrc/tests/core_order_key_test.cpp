// Keys have the order of their floats, zeros of both signs are one score, and a key converts back to its score.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/order_key.h"

namespace ace {
namespace {

// Each exponent and sign with a few mantissas, random patterns, and the values at the edges of the format.
std::vector<float> sorted_samples() {
  std::vector<float> samples = {0.0f, -0.0f, 1.0f, -1.0f};
  for (uint32_t sign : {0u, 0x80000000u}) {
    for (uint32_t exponent = 0; exponent < 255; ++exponent) {
      for (uint32_t mantissa : {0u, 1u, 2u, 0x3fffffu, 0x400000u, 0x7ffffeu, 0x7fffffu}) {
        samples.push_back(bits_float(sign | exponent << 23 | mantissa));
      }
    }
  }
  std::mt19937 random(7);
  for (int i = 0; i < 20000; ++i) {
    const float value = bits_float(random());
    if (is_finite(value)) samples.push_back(value);
  }
  std::sort(samples.begin(), samples.end());
  return samples;
}

TEST(OrderKey, OrdersAsFloatsDo) {
  const std::vector<float> samples = sorted_samples();
  for (size_t i = 1; i < samples.size(); ++i) {
    const float low = samples[i - 1], high = samples[i];
    if (low == high) {
      ASSERT_EQ(order_key(low), order_key(high)) << low;
    } else {
      ASSERT_LT(order_key(low), order_key(high)) << low << " and " << high;
    }
  }
}

TEST(OrderKey, ZerosAreOneScore) {
  EXPECT_EQ(order_key(-0.0f), order_key(0.0f));
  EXPECT_EQ(float_bits(key_score(order_key(-0.0f))), 0u);
  EXPECT_LT(order_key(-std::numeric_limits<float>::denorm_min()), order_key(0.0f));
  EXPECT_GT(order_key(std::numeric_limits<float>::denorm_min()), order_key(-0.0f));
}

TEST(OrderKey, GivesTheScoreBack) {
  for (float score : sorted_samples()) {
    const uint32_t expected = score == 0.0f ? 0u : float_bits(score);
    ASSERT_EQ(float_bits(key_score(order_key(score))), expected) << score;
  }
}

// radix_select.h uses key - 1 and key + 1, which must not wrap.
TEST(OrderKey, FiniteScoresLeaveBothEndsFree) {
  EXPECT_GT(order_key(std::numeric_limits<float>::lowest()), 1u);
  EXPECT_LT(order_key(std::numeric_limits<float>::max()), 0xfffffffeu);
}

template <class Scalar>
void expect_keys_of_16_bits() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float score = to_float(Scalar{static_cast<uint16_t>(bits)});
    if (!is_finite(score)) continue;
    ASSERT_EQ(key_score(order_key(score)), score) << "pattern " << bits;
    ASSERT_EQ(order_key(score) > order_key(0.0f), score > 0.0f) << "pattern " << bits;
  }
}

TEST(OrderKey, SixteenBitScoresWidenFirst) {
  expect_keys_of_16_bits<Half>();
  expect_keys_of_16_bits<BFloat16>();
}

}  // namespace
}  // namespace ace
