// Each formula against the same products written out. Values that are not finite must give scores that are not finite.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/score.h"

namespace ace {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Each rounded operation has a relative error of at most u = 2^-24.
void expect_relative(float value, double expected, int roundings) {
  EXPECT_LE(std::fabs(value - expected), roundings * std::ldexp(1.0, -24) * std::fabs(expected)) << expected;
}

TEST(Score, MatchesDoubleWithinItsRoundings) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 1000; ++i) {
    const float weight = normal(random);
    const double size = std::fabs(weight);
    const ScoreTerms terms{std::fabs(normal(random)) + 2.0f, std::fabs(normal(random)) / 4.0f,
                           std::fabs(normal(random)) + 3.0f, std::fabs(normal(random)) + 5.0f};
    const double c = terms.column, q = terms.moment;
    EXPECT_EQ(MagnitudeScore::value(weight, terms), std::fabs(weight));
    expect_relative(ScaledScore::value(weight, terms), size * c, 1);
    expect_relative(RiaScore::value(weight, terms), (size / terms.column_sum + size / terms.row_sum) * c, 4);
    expect_relative(CospScore::value(weight, terms), size * c * size * std::sqrt(q), 5);
    expect_relative(CospExactScore::value(weight, terms), size * std::sqrt((c - q) / 2), 5);
    EXPECT_EQ(GivenScore::value(weight, terms), terms.moment);
  }
}

TEST(Score, HandComputed) {
  const ScoreTerms terms{3.0f, 4.0f, 8.0f, 16.0f};
  EXPECT_EQ(ScaledScore::value(-2.0f, terms), 6.0f);
  EXPECT_EQ(RiaScore::value(-2.0f, terms), 1.125f);                          // (2/16 + 2/8) 3
  EXPECT_EQ(CospScore::value(-2.0f, terms), 24.0f);                          // (2 * 3) (2 * 2)
  EXPECT_EQ(CospExactScore::value(-2.0f, {12.0f, 4.0f, 0.0f, 0.0f}), 4.0f);  // 2 sqrt(8 / 2)
  EXPECT_EQ(CospExactScore::value(-2.0f, {1.0f, 0.5f, 0.0f, 0.0f}), 1.0f);   // 2 sqrt(0.5 / 2)
}

TEST(Score, ZeroWeightOfAZeroRowAndColumnScoresZero) {
  const ScoreTerms terms{2.0f, 0.0f, 0.0f, 0.0f};
  EXPECT_EQ(float_bits(RiaScore::value(0.0f, terms)), 0u);
  EXPECT_EQ(float_bits(RiaScore::value(-0.0f, terms)), 0u);
}

TEST(Score, CosineLossIsClampedAtZero) {  // rounding may raise the moment just above the column
  EXPECT_EQ(float_bits(CospExactScore::value(2.0f, {1.0f, 1.0000001f, 0.0f, 0.0f})), 0u);
}

// For every formula and any other terms: if one needed term is not finite, the score is not finite.
template <class Functor>
void expect_bad_terms_show() {
  const std::vector<float> bad = {kInfinity, -kInfinity, kNan, -kNan};
  const std::vector<float> any = {0.0f, -0.0f, 1.5f, 1e-40f, kInfinity, -kInfinity, kNan};
  const auto shows = [](float weight, float column, float moment) {
    return !is_finite(Functor::value(weight, {column, moment, 1.0f, 1.0f}));
  };
  for (float wrong : bad) {
    for (float a : any) {
      for (float b : any) {
        EXPECT_TRUE(shows(wrong, a, b)) << "weight " << wrong << ", column " << a << ", moment " << b;
        EXPECT_TRUE(!Functor::kColumn || shows(a, wrong, b)) << "column " << wrong << " with " << a << ", " << b;
        EXPECT_TRUE(!Functor::kMoment || shows(a, b, wrong)) << "moment " << wrong << " with " << a << ", " << b;
      }
    }
  }
}

TEST(Score, NothingBadPassesUnseen) {
  expect_bad_terms_show<MagnitudeScore>();
  expect_bad_terms_show<ScaledScore>();
  expect_bad_terms_show<RiaScore>();
  expect_bad_terms_show<CospScore>();
  expect_bad_terms_show<CospExactScore>();
  expect_bad_terms_show<GivenScore>();
}

// A term that a functor does not declare may be absent: it must not change the score. Each declared term must.
template <class Functor>
void expect_reads_what_it_says() {
  const auto value = [](float column, float moment, float row_sum, float column_sum) {
    return Functor::value(2.0f, {column, moment, row_sum, column_sum});
  };
  const float score = value(3.0f, 1.0f, 8.0f, 16.0f);
  EXPECT_EQ(Functor::kColumn, value(4.0f, 1.0f, 8.0f, 16.0f) != score);
  EXPECT_EQ(Functor::kMoment, value(3.0f, 2.0f, 8.0f, 16.0f) != score);
  EXPECT_EQ(Functor::kSums, value(3.0f, 1.0f, 4.0f, 16.0f) != score);
  EXPECT_EQ(Functor::kSums, value(3.0f, 1.0f, 8.0f, 32.0f) != score);
}

TEST(Score, ReadsWhatItSays) {
  expect_reads_what_it_says<MagnitudeScore>();
  expect_reads_what_it_says<ScaledScore>();
  expect_reads_what_it_says<RiaScore>();
  expect_reads_what_it_says<CospScore>();
  expect_reads_what_it_says<CospExactScore>();
  expect_reads_what_it_says<GivenScore>();
}

TEST(Score, OverflowShows) {
  const float huge = std::numeric_limits<float>::max();
  EXPECT_FALSE(is_finite(ScaledScore::value(huge, {2.0f, 0.0f, 0.0f, 0.0f})));
  EXPECT_FALSE(is_finite(CospScore::value(1e20f, {1.0f, 1.0f, 0.0f, 0.0f})));
  EXPECT_FALSE(is_finite(CospExactScore::value(huge, {100.0f, 0.0f, 0.0f, 0.0f})));
}

TEST(Score, EveryNameHasItsFormula) {
  const ScoreTerms terms{3.0f, 1.0f, 8.0f, 16.0f};
  const std::map<std::string, float> expected = {{"magnitude", 2.0f}, {"scaled", 6.0f},     {"ria", 1.125f},
                                                 {"cosp", 12.0f},     {"cosp_exact", 2.0f}, {"score", 1.0f}};
  size_t names = 0;
  for (const FormulaName& known : kFormulas) {
    ASSERT_EQ(expected.count(known.name), 1u) << known.name;
    const float value = with_formula(known.formula, [&](auto functor) { return functor.value(-2.0f, terms); });
    EXPECT_EQ(value, expected.at(known.name)) << known.name;
    ++names;
  }
  EXPECT_EQ(names, expected.size());
}

}  // namespace
}  // namespace ace
