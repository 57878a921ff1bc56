// Every half and bfloat16 pattern against a conversion written from the format's definition.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/scalar.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace ace {
namespace {

// The value of a small IEEE format: sign, exponent_bits, mantissa_bits. Double holds every one of them exactly.
double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int top = (1 << exponent_bits) - 1;
  const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1u));
  const int exponent = static_cast<int>(bits >> mantissa_bits) & top;
  const double sign = (bits >> (exponent_bits + mantissa_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == top) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class Scalar>
void expect_all_patterns(int exponent_bits, int mantissa_bits) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = to_float(Scalar{static_cast<uint16_t>(bits)});
    const double expected = decode(bits, exponent_bits, mantissa_bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << "pattern " << bits;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected) << "pattern " << bits;
    }
    ASSERT_EQ(std::signbit(value), bits >> 15 != 0) << "pattern " << bits;
  }
}

TEST(Scalar, HalfWidensExactly) { expect_all_patterns<Half>(5, 10); }

TEST(Scalar, BFloat16WidensExactly) { expect_all_patterns<BFloat16>(8, 7); }

TEST(Scalar, FloatStaysItself) { EXPECT_EQ(float_bits(to_float(bits_float(0x12345678u))), 0x12345678u); }

#if defined(__SSE2__)
// A caller may run under flush-to-zero, which must not change a subnormal half.
TEST(Scalar, SubnormalHalfSurvivesFlushToZero) {
  constexpr unsigned kFlushToZero = 0x8040u;  // FTZ and DAZ
  const unsigned before = _mm_getcsr();
  uint32_t wrong = 0;
  _mm_setcsr(before | kFlushToZero);
  for (uint32_t bits = 1; bits < 0x400u; ++bits) {
    const float value = to_float(Half{static_cast<uint16_t>(bits)});
    wrong += value != static_cast<float>(bits) / 16777216.0f;
  }
  _mm_setcsr(before);
  EXPECT_EQ(wrong, 0u);
}
#endif

TEST(Scalar, ToBFloat16RoundsToNearestAndKeepsNaN) {
  const auto rounded = [](uint32_t bits) { return to_bfloat16(bits_float(bits)).bits; };
  EXPECT_EQ(rounded(0x3f808000u), 0x3f80u);  // ties to even
  EXPECT_EQ(rounded(0x3f818000u), 0x3f82u);
  EXPECT_EQ(rounded(0x3f808001u), 0x3f81u);
  EXPECT_EQ(rounded(0x7f7fffffu), 0x7f80u);  // overflow
  EXPECT_EQ(rounded(0xff800000u), 0xff80u);
  EXPECT_EQ(rounded(0x80000001u), 0x8000u);
  for (const uint32_t nan : {0x7fffffffu, 0xffffffffu, 0x7fc00000u, 0x7f800001u}) EXPECT_EQ(rounded(nan), 0x7fffu);
}

TEST(Scalar, AbsoluteClearsOnlyTheSign) {
  EXPECT_EQ(absolute(-1.5f), 1.5f);
  EXPECT_EQ(absolute(1.5f), 1.5f);
  EXPECT_EQ(float_bits(absolute(-0.0f)), 0u);
  EXPECT_EQ(absolute(-std::numeric_limits<float>::infinity()), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(absolute(-std::numeric_limits<float>::quiet_NaN())));
}

TEST(Scalar, IsFinite) {
  for (float value : {0.0f, -0.0f, 1.0f, std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
                      std::numeric_limits<float>::denorm_min()}) {
    EXPECT_TRUE(is_finite(value)) << value;
  }
  EXPECT_FALSE(is_finite(std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(is_finite(-std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(is_finite(std::numeric_limits<float>::quiet_NaN()));
  EXPECT_FALSE(is_finite(bits_float(0x7f800001u)));  // a signalling NaN
  EXPECT_FALSE(is_finite(bits_float(0xffffffffu)));
}

TEST(Scalar, HalfOfAFloatIsTheNearest) {
  for (uint32_t n = 0; n < 0x7c00u; ++n) {  // every finite half, and what lies between it and the next
    const float here = to_float(Half{static_cast<uint16_t>(n)});
    const float next = n + 1 < 0x7c00u ? to_float(Half{static_cast<uint16_t>(n + 1)}) : 65536.0f;
    const float middle = (here + next) / 2;
    ASSERT_EQ(to_half(here).bits, n);
    ASSERT_EQ(to_half(-here).bits, n | 0x8000u);
    ASSERT_EQ(to_half(middle).bits, n % 2 ? n + 1 : n);  // ties to even
    ASSERT_EQ(to_half(bits_float(float_bits(middle) - 1)).bits, n);
    ASSERT_EQ(to_half(bits_float(float_bits(middle) + 1)).bits, n + 1);
  }
  EXPECT_EQ(to_half(bits_float(0x7f800000u)).bits, 0x7c00u);
  EXPECT_EQ(to_half(bits_float(0x7fc00000u)).bits, 0x7fffu);
  EXPECT_EQ(to_half(1e-12f).bits, 0u);
}

}  // namespace
}  // namespace ace
