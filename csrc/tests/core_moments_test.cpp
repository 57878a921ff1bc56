// Welford states against two passes in long double, and the algebraic laws of a merge.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/moments.h"

namespace ace {
namespace {

// A value of the given weight (>= 0).
template <class Real, class Value>
void add(Welford<Real>& state, Value value, Value weight) {
  state.merge({static_cast<Real>(weight), static_cast<Real>(value), Real(0)});
}

// Population variance; 0 for an empty state.
template <class Real>
Real variance(const Welford<Real>& state) {
  return state.weight > Real(0) ? state.m2 / state.weight : Real(0);
}

// Weighted sum of squares about zero.
template <class Real>
Real square_sum(const Welford<Real>& state) {
  return state.m2 + state.weight * state.mean * state.mean;
}

struct Sample {
  float value;
  float weight;
};

struct Exact {
  long double weight = 0, mean = 0, m2 = 0, absolute_sum = 0, square_sum = 0;
};

Exact two_passes(const std::vector<Sample>& samples) {
  Exact exact;
  long double sum = 0;
  for (const Sample& s : samples) {
    exact.weight += s.weight;
    sum += static_cast<long double>(s.weight) * s.value;
    exact.absolute_sum += static_cast<long double>(s.weight) * std::fabs(s.value);
    exact.square_sum += static_cast<long double>(s.weight) * s.value * s.value;
  }
  if (exact.weight > 0) exact.mean = sum / exact.weight;
  for (const Sample& s : samples) exact.m2 += s.weight * (s.value - exact.mean) * (s.value - exact.mean);
  return exact;
}

// Four roundings a step, n steps. Mean: n steps, each rounded relative to the running sum of |x|. M2: n u kappa with
// kappa^2 = sum of squares / M2 (Chan, Golub and LeVeque 1983), and its second-order term where M2 vanishes.
template <class Real>
void expect_close(const Welford<Real>& state, const Exact& exact, size_t n) {
  const long double unit = 4.0L * n * std::numeric_limits<Real>::epsilon() / 2;
  EXPECT_LE(std::fabs(state.weight - exact.weight), unit * exact.weight);
  EXPECT_LE(std::fabs(state.mean - exact.mean), exact.weight > 0 ? unit * exact.absolute_sum / exact.weight : 0);
  EXPECT_LE(std::fabs(state.m2 - exact.m2),
            unit * std::sqrt(exact.square_sum * exact.m2) + unit * unit * exact.square_sum);
}

std::vector<Sample> draw(size_t n, float mean, float deviation, bool weighted, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> value(mean, deviation);
  std::uniform_real_distribution<float> weight(0.0f, 2.0f);
  std::vector<Sample> samples;
  for (size_t i = 0; i < n; ++i) samples.push_back({value(random), weighted ? weight(random) : 1.0f});
  for (size_t i = 0; weighted && i < n; i += 3) samples[i].weight = 0.0f;
  return samples;
}

template <class Real>
Welford<Real> accumulate(const std::vector<Sample>& samples, size_t from, size_t to) {
  Welford<Real> state;
  for (size_t i = from; i < to; ++i) add(state, samples[i].value, samples[i].weight);
  return state;
}

template <class Real>
class WelfordTest : public ::testing::Test {};
using Reals = ::testing::Types<float, double>;
TYPED_TEST_SUITE(WelfordTest, Reals);

TYPED_TEST(WelfordTest, MatchesTwoPasses) {
  for (size_t n : {1, 2, 31, 32, 33, 129, 1134}) {
    for (bool weighted : {false, true}) {
      for (float mean : {0.0f, 1.0f, 300.0f}) {
        SCOPED_TRACE(testing::Message() << "n " << n << ", weighted " << weighted << ", mean " << mean);
        const std::vector<Sample> samples = draw(n, mean, 0.5f, weighted, static_cast<unsigned>(n));
        expect_close(accumulate<TypeParam>(samples, 0, n), two_passes(samples), n);
      }
    }
  }
}

TYPED_TEST(WelfordTest, FirstTokenMayBeMassive) {
  std::vector<Sample> samples = draw(512, 0.0f, 0.5f, false, 3);
  samples[0].value = 3000.0f;
  expect_close(accumulate<TypeParam>(samples, 0, samples.size()), two_passes(samples), samples.size());
}

TYPED_TEST(WelfordTest, AnySplitMergesToTheWhole) {
  const std::vector<Sample> samples = draw(200, 5.0f, 1.0f, true, 11);
  const Exact exact = two_passes(samples);
  for (size_t cut : {0, 1, 2, 99, 199, 200}) {
    Welford<TypeParam> left = accumulate<TypeParam>(samples, 0, cut);
    left.merge(accumulate<TypeParam>(samples, cut, samples.size()));
    expect_close(left, exact, samples.size());
  }
}

TYPED_TEST(WelfordTest, MergeIsAssociativeWithinTheBound) {
  const std::vector<Sample> samples = draw(300, 20.0f, 1.0f, true, 13);
  const Welford<TypeParam> a = accumulate<TypeParam>(samples, 0, 40), b = accumulate<TypeParam>(samples, 40, 170),
                           c = accumulate<TypeParam>(samples, 170, 300);
  Welford<TypeParam> left = a, right = b;
  left.merge(b);
  left.merge(c);
  right.merge(c);
  Welford<TypeParam> nested = a;
  nested.merge(right);
  const Exact exact = two_passes(samples);
  expect_close(left, exact, samples.size());
  expect_close(nested, exact, samples.size());
}

TYPED_TEST(WelfordTest, EmptySideChangesNothing) {
  const Welford<TypeParam> full{TypeParam(3), TypeParam(0.1), TypeParam(0.7)};
  Welford<TypeParam> left = full, right;
  left.merge({});
  right.merge(full);
  for (const Welford<TypeParam>& merged : {left, right}) {
    EXPECT_EQ(merged.weight, full.weight);
    EXPECT_EQ(merged.mean, full.mean);
    EXPECT_EQ(merged.m2, full.m2);
  }
  Welford<TypeParam> empty;
  empty.merge({});
  EXPECT_EQ(empty.weight, TypeParam(0));
  EXPECT_EQ(empty.mean, TypeParam(0));
  EXPECT_EQ(empty.m2, TypeParam(0));
  EXPECT_EQ(variance(empty), TypeParam(0));
}

TYPED_TEST(WelfordTest, WeightZeroChangesNothing) {
  Welford<TypeParam> state{TypeParam(3), TypeParam(0.1), TypeParam(0.7)};
  add(state, TypeParam(1e9), TypeParam(0));
  add(state, std::numeric_limits<TypeParam>::max(), TypeParam(0));  // its square is infinite
  EXPECT_EQ(state.weight, TypeParam(3));
  EXPECT_EQ(state.mean, TypeParam(0.1));
  EXPECT_EQ(state.m2, TypeParam(0.7));
}

TYPED_TEST(WelfordTest, EqualValuesHaveNoVariance) {
  Welford<TypeParam> state;
  for (int i = 0; i < 1000; ++i) add(state, TypeParam(0.3), TypeParam(1));
  EXPECT_EQ(state.mean, TypeParam(0.3));
  EXPECT_EQ(state.m2, TypeParam(0));
}

TEST(Welford, HandComputed) {
  Welford<double> state;
  add(state, 1.0, 1.0);
  add(state, 3.0, 3.0);  // mean (1 + 9) / 4 = 2.5; M2 = 1.5^2 + 3 * 0.5^2 = 3
  EXPECT_DOUBLE_EQ(state.weight, 4.0);
  EXPECT_DOUBLE_EQ(state.mean, 2.5);
  EXPECT_DOUBLE_EQ(state.m2, 3.0);
  EXPECT_DOUBLE_EQ(variance(state), 0.75);
  EXPECT_DOUBLE_EQ(square_sum(state), 28.0);
}

}  // namespace
}  // namespace ace
