// Rows selected by places, and groups by vector lanes, against the selections of the core, which define the result.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/nm_rows.h"
#include "cpu/row_selector.h"
#include "tests/select_kth.h"

namespace ace::cpu {
namespace {

template <class T>
T weight_of(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return to_bfloat16(value);
  }
}

Bits<float> bits_of(float value) { return float_bits(value); }
Bits<BFloat16> bits_of(BFloat16 value) { return value.bits; }

// A row of weights and the inputs of its scores; `distinct` > 0 limits the number of values, so that scores tie.
template <class T>
struct Row {
  Row(int64_t cols, float scale, uint32_t distinct, std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t j = 0; j < cols; ++j) {
      const float value = distinct > 0 ? static_cast<float>(random() % distinct) - 1.0f : normal(random);
      weight.push_back(weight_of<T>(scale * value));
      column.push_back(distinct > 0 ? 0.5f : std::abs(normal(random)));
      moment.push_back(distinct > 0 ? static_cast<float>(random() % distinct) - 1.0f : normal(random));
      column_sum.push_back(2.0f);
    }
  }

  ScoredRow<T> scored() const {
    return {weight.data(), column.data(), moment.data(), column_sum.data(), 3.0f, static_cast<int64_t>(weight.size())};
  }

  std::vector<Bits<T>> bits() const {
    std::vector<Bits<T>> out;
    for (const T value : weight) out.push_back(bits_of(value));
    return out;
  }

  std::vector<T> weight;
  std::vector<float> column, moment, column_sum;
};

template <class F, class T>
std::vector<uint32_t> keys_of(const Row<T>& row) {
  std::vector<uint32_t> keys(row.weight.size());
  EXPECT_TRUE(row_keys<F>(row.scored(), keys.data()));
  return keys;
}

template <class F, class T>
void expect_row_as_the_core(RowSelector<F, T>& selector, const Row<T>& row, int64_t keep_k) {
  const int64_t cols = static_cast<int64_t>(row.weight.size());
  const std::vector<uint32_t> keys = keys_of<F>(row);
  std::vector<uint32_t> scratch(keys.size()), counts(kRadixBins);
  Cut cut = select_kth(keys.data(), cols, keep_k, scratch.data(), counts.data());
  const float threshold = cut_threshold(cut);
  std::vector<Bits<T>> expected = row.bits();
  std::vector<bool> kept;
  for (size_t j = 0; j < keys.size(); ++j) {
    kept.push_back(keys[j] > cut.key || (keys[j] == cut.key && cut.ties-- > 0));
    if (!kept[j]) expected[j] = 0;
  }
  // As in a caller: the row that is read is also written.
  Row<T> pruned = row;
  std::vector<Bits<T>> written(row.weight.size());
  const float actual = selector.select(pruned.scored(), PruneRow<T>{reinterpret_cast<Bits<T>*>(pruned.weight.data())});
  std::memcpy(written.data(), pruned.weight.data(), written.size() * sizeof(Bits<T>));
  ASSERT_EQ(written, expected) << cols << " " << keep_k;
  ASSERT_EQ(float_bits(actual), float_bits(threshold)) << cols << " " << keep_k;
  const std::unique_ptr<bool[]> mask(new bool[row.weight.size()]);
  ASSERT_EQ(float_bits(selector.select(row.scored(), MaskRow{mask.get()})), float_bits(threshold));
  for (size_t j = 0; j < kept.size(); ++j) ASSERT_EQ(mask[j], kept[j]) << cols << " " << keep_k;
}

// One selector gets rows of slowly and of suddenly changing scale, with and without ties: its hints must not change the
// result.
template <class F, class T>
void expect_rows_as_the_core() {
  std::mt19937 random(7);
  for (const int64_t cols : {1, 2, 31, 129, 1134, 5000}) {
    for (const int64_t keep_k : {int64_t{0}, int64_t{1}, cols / 3, cols / 2, cols - 1, cols}) {
      RowSelector<F, T> selector(cols, keep_k);
      for (const float scale : {1.0f, 1.1f, 0.9f, 1.0f, 0.0f, 1.0f, 30.0f, 1e-3f, 1.5f, 1e-38f, 1.0f}) {
        for (const uint32_t distinct : {0u, 0u, 2u, 5u, 0u}) {
          expect_row_as_the_core(selector, Row<T>(cols, scale, distinct, random), keep_k);
        }
      }
    }
  }
}

TEST(RowSelector, KeepsWhatTheRadixSelectionKeeps) {
  expect_rows_as_the_core<MagnitudeScore, BFloat16>();  // many ties of 8-bit mantissas
  expect_rows_as_the_core<ScaledScore, BFloat16>();
  expect_rows_as_the_core<ScaledScore, float>();
  expect_rows_as_the_core<RiaScore, float>();
}

TEST(RowSelector, TakesScoresOfBothSigns) { expect_rows_as_the_core<GivenScore, BFloat16>(); }

TEST(RowPlaces, NeverDescendWhereScoresAscend) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  for (const PlaceScale scale :
       {place_scale(-1.0f, 1.0f), place_scale(0.25f, 0.75f), place_scale(1.0f, std::nextafter(1.0f, 2.0f)),
        place_scale(0.0f, 1e-45f), place_scale(-1.7e38f, 1.7e38f)}) {
    std::vector<float> scores{-3.4e38f, -0.0f, 0.0f, 3.4e38f, scale.low, scale.high};
    for (int i = 0; i < 5000; ++i) scores.push_back(normal(random) * (i % 2 == 0 ? 1.0f : scale.high));
    std::sort(scores.begin(), scores.end());
    for (size_t i = 1; i < scores.size(); ++i) {
      ASSERT_LE(place_of(scores[i - 1], scale), place_of(scores[i], scale)) << scores[i];
    }
    EXPECT_EQ(place_of(-0.0f, scale), place_of(0.0f, scale));
  }
}

TEST(RowPlaces, CountsAndFindsAtEveryOffset) {
  std::mt19937 random(9);
  for (const int64_t n : {0, 1, 127, 128, 129, 40000}) {
    std::vector<uint16_t> places(static_cast<size_t>(n));
    for (uint16_t& place : places) place = static_cast<uint16_t>(random() % 300);
    for (const int64_t low : {0, 1, 150, 299, 65535}) {
      const auto reaches = [&](uint16_t place) { return place >= low; };
      EXPECT_EQ(count_places(places.data(), n, static_cast<uint16_t>(low)),
                std::count_if(places.begin(), places.end(), reaches));
      for (int64_t begin = 0; begin <= n; begin += 1 + n / 50) {
        const auto found = std::find_if(places.begin() + begin, places.end(),
                                        [&](uint16_t place) { return place >= low && place < low + 1; });
        ASSERT_EQ(next_within(places.data(), begin, n, low, low + 1), found - places.begin());
      }
    }
  }
}

template <int kGroup, class F, class T>
void expect_groups_as_the_core() {
  std::mt19937 random(10);
  for (const int64_t groups : {1, 7, 64, 77}) {
    for (const uint32_t distinct : {0u, 2u, 5u}) {
      const Row<T> row(groups * kGroup, 1.0f, distinct, random);
      const std::vector<uint32_t> keys = keys_of<F>(row);
      const std::vector<float> column = by_place(row.column.data(), groups * kGroup, kGroup);
      ScoredRow<T> reordered = row.scored();
      reordered.column = column.data();
      std::vector<float> scores(keys.size());
      for (int keep_n = 0; keep_n <= kGroup; ++keep_n) {
        std::vector<Bits<T>> weight = row.bits(), expected = row.bits();
        keep_best_of_scored_row<kGroup, F>(row.scored(), PruneRow<T>{weight.data()}, keep_n, scores.data());
        const std::unique_ptr<bool[]> mask(new bool[expected.size()]);
        keep_best_of_scored_row<kGroup, F>(row.scored(), MaskRow{mask.get()}, keep_n, scores.data());
        for (size_t j = 0; j < expected.size(); ++j) {
          const uint32_t kept = keep_best<kGroup>(keys.data() + j / kGroup * kGroup, kGroup, keep_n);
          ASSERT_EQ(mask[j], (kept >> j % kGroup & 1u) != 0) << keep_n << ":" << kGroup;
          if (!mask[j]) expected[j] = 0;
        }
        ASSERT_EQ(weight, expected) << keep_n << ":" << kGroup;
        if constexpr (kOnePass<F, PruneRow<T>>) {
          weight = row.bits();
          keep_best_of_row<kGroup, F>(reordered, PruneRow<T>{weight.data()}, keep_n);
          ASSERT_EQ(weight, expected) << keep_n << ":" << kGroup << " in one pass";
        }
      }
    }
  }
}

template <int kGroup>
void expect_groups_of_all_formulas() {
  expect_groups_as_the_core<kGroup, MagnitudeScore, BFloat16>();
  expect_groups_as_the_core<kGroup, ScaledScore, BFloat16>();
  expect_groups_as_the_core<kGroup, ScaledScore, float>();
  expect_groups_as_the_core<kGroup, RiaScore, BFloat16>();
  expect_groups_as_the_core<kGroup, GivenScore, float>();
}

TEST(NmRows, KeepWhatTheCoreKeeps) {
  expect_groups_of_all_formulas<2>();
  expect_groups_of_all_formulas<4>();
  expect_groups_of_all_formulas<8>();
}

TEST(LargestSize, IsTheLargestAndShowsWhatIsNotFinite) {
  const auto bfloat = [](float value) { return BFloat16{static_cast<uint16_t>(float_bits(value) >> 16)}; };
  std::vector<BFloat16> values(1000, bfloat(-1.0f));
  EXPECT_EQ(largest_size(values.data(), 0), 0.0f);
  EXPECT_EQ(largest_size(values.data(), 1000), 1.0f);
  values[999] = bfloat(-2.5f);
  EXPECT_EQ(largest_size(values.data(), 1000), 2.5f);
  values[500] = bfloat(-INFINITY);
  EXPECT_FALSE(is_finite(largest_size(values.data(), 1000)));
  values[3] = bfloat(NAN);
  EXPECT_TRUE(std::isnan(largest_size(values.data(), 1000)));
  const std::vector<Half> halves{{0x0001}, {0xbc00}};
  EXPECT_EQ(largest_size(halves.data(), 1), 5.9604644775390625e-8f);
  EXPECT_EQ(largest_size(halves.data(), 2), 1.0f);
}

}  // namespace
}  // namespace ace::cpu
