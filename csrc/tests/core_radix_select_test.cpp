// The cut of a radix selection against std::stable_sort: for all sizes, ties and values of k.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "core/radix_select.h"
#include "tests/select_kth.h"

namespace ace {
namespace {

std::vector<bool> kept_by_sort(const std::vector<uint32_t>& keys, int64_t keep_k) {
  std::vector<size_t> order(keys.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] > keys[b]; });
  std::vector<bool> kept(keys.size(), false);
  for (int64_t i = 0; i < keep_k; ++i) kept[order[static_cast<size_t>(i)]] = true;
  return kept;
}

std::vector<bool> kept_by_cut(const std::vector<uint32_t>& keys, Cut cut) {
  std::vector<bool> kept;
  for (uint32_t key : keys) kept.push_back(key > cut.key || (key == cut.key && cut.ties-- > 0));
  return kept;
}

// The exact sizes let a sanitizer detect an access past either buffer.
Cut select(const std::vector<uint32_t>& keys, int64_t keep_k) {
  std::vector<uint32_t> scratch(keys.size()), counts(kRadixBins);
  return select_kth(keys.data(), static_cast<int64_t>(keys.size()), keep_k, scratch.data(), counts.data());
}

void expect_cut(const std::vector<uint32_t>& keys, int64_t keep_k) {
  const Cut cut = select(keys, keep_k);
  const std::vector<bool> kept = kept_by_sort(keys, keep_k);
  ASSERT_EQ(kept_by_cut(keys, cut), kept) << "n " << keys.size() << ", k " << keep_k;
  uint32_t smallest = 0xffffffffu;
  for (size_t i = 0; i < keys.size(); ++i) smallest = kept[i] ? std::min(smallest, keys[i]) : smallest;
  const float expected = keep_k == 0 ? std::numeric_limits<float>::infinity() : key_score(smallest);
  ASSERT_EQ(float_bits(cut_threshold(cut)), float_bits(expected)) << "n " << keys.size() << ", k " << keep_k;
}

std::vector<uint32_t> keys_of(const std::vector<float>& scores) {
  std::vector<uint32_t> keys;
  for (float score : scores) keys.push_back(order_key(score));
  return keys;
}

std::set<int64_t> places(int64_t n) {
  std::set<int64_t> all;
  for (int64_t k : {int64_t{0}, int64_t{1}, int64_t{2}, n / 3, n / 2, n - 2, n - 1, n}) {
    if (k >= 0 && k <= n) all.insert(k);
  }
  return all;
}

const int64_t kSizes[] = {0, 1, 2, 3, 31, 32, 33, 129, 1134, 5000};

TEST(RadixSelect, NormalScores) {
  std::mt19937 random(23);
  std::normal_distribution<float> normal;
  for (int64_t n : kSizes) {
    std::vector<float> scores(static_cast<size_t>(n));
    for (float& score : scores) score = normal(random);
    for (int64_t k : places(n)) expect_cut(keys_of(scores), k);
  }
}

TEST(RadixSelect, TiesOfEveryDensity) {
  std::mt19937 random(29);
  for (int64_t n : kSizes) {
    for (uint32_t distinct : {1u, 2u, 5u, 100u}) {
      std::vector<float> scores(static_cast<size_t>(n));
      for (float& score : scores) score = static_cast<float>(random() % distinct) / 8.0f - 1.0f;
      for (int64_t k : places(n)) expect_cut(keys_of(scores), k);
    }
  }
}

TEST(RadixSelect, EveryKOfASmallSet) {
  std::mt19937 random(31);
  for (int64_t n = 1; n <= 24; ++n) {
    std::vector<float> scores(static_cast<size_t>(n));
    for (float& score : scores) score = static_cast<float>(random() % 7) - 3.0f;
    for (int64_t k = 0; k <= n; ++k) expect_cut(keys_of(scores), k);
  }
}

// Keys that differ in one digit only, so that one given pass decides.
TEST(RadixSelect, EachPassDecides) {
  std::mt19937 random(37);
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    std::vector<uint32_t> keys(700);
    for (uint32_t& key : keys) {
      const uint32_t digit = random() % static_cast<uint32_t>(radix_bins(pass));
      key = (0x9a5b3c1du & ~((static_cast<uint32_t>(radix_bins(pass)) - 1u) << radix_digit(pass).shift)) |
            digit << radix_digit(pass).shift;
    }
    for (int64_t k : places(700)) expect_cut(keys, k);
  }
}

TEST(RadixSelect, ArbitraryFinitePatterns) {
  std::mt19937 random(41);
  std::vector<float> scores;
  while (scores.size() < 3000) {
    const float score = bits_float(random());
    if (is_finite(score)) scores.push_back(score);
  }
  for (float edge : {0.0f, -0.0f, std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(),
                     std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::denorm_min()}) {
    scores.insert(scores.begin() + static_cast<long>(random() % scores.size()), edge);
  }
  for (int64_t k : places(static_cast<int64_t>(scores.size()))) expect_cut(keys_of(scores), k);
}

TEST(RadixSelect, ZerosOfBothSignsTie) {
  const std::vector<uint32_t> keys = keys_of({-0.0f, 0.0f, -1.0f, -0.0f, 0.0f});
  EXPECT_EQ(kept_by_cut(keys, select(keys, 2)), (std::vector<bool>{true, true, false, false, false}));
  EXPECT_EQ(kept_by_cut(keys, select(keys, 3)), (std::vector<bool>{true, true, false, true, false}));
  EXPECT_EQ(float_bits(cut_threshold(select(keys, 3))), 0u);
}

TEST(RadixSelect, ThresholdOfNothingIsInfinity) {
  EXPECT_EQ(cut_threshold(kKeepNone), std::numeric_limits<float>::infinity());
  EXPECT_EQ(cut_threshold(select(keys_of({1.0f, 2.0f}), 0)), std::numeric_limits<float>::infinity());
  EXPECT_EQ(cut_threshold(select({}, 0)), std::numeric_limits<float>::infinity());
}

TEST(RadixSelect, DigitsCoverTheKeyOnce) {
  uint32_t covered = 0;
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    const uint32_t mask = (static_cast<uint32_t>(radix_bins(pass)) - 1u) << radix_digit(pass).shift;
    EXPECT_EQ(covered & mask, 0u);
    EXPECT_LE(radix_bins(pass), kRadixBins);
    covered |= mask;
    EXPECT_EQ(radix_bin(mask, pass), static_cast<uint32_t>(radix_bins(pass)) - 1u);
  }
  EXPECT_EQ(covered, 0xffffffffu);
}

TEST(RadixSelect, MatchesLooksOnlyAboveThePass) {
  EXPECT_TRUE(radix_matches(0u, 0xffffffffu, 0));
  EXPECT_TRUE(radix_matches(0xabcfffffu, 0xabc00000u & 0xffe00000u, 1) ==
              (radix_bin(0xabcfffffu, 0) == radix_bin(0xabc00000u, 0)));
  for (int pass = 1; pass < kRadixPasses; ++pass) {
    const int low = radix_digit(pass).shift + radix_digit(pass).bits;
    const uint32_t key = 0x5a5a5a5au;
    EXPECT_TRUE(radix_matches(key, key ^ ((1u << low) - 1u), pass));
    EXPECT_FALSE(radix_matches(key, key ^ (1u << low), pass));
    EXPECT_FALSE(radix_matches(key, key ^ 0x80000000u, pass));
  }
}

TEST(RadixSelect, FindBin) {
  const std::vector<uint32_t> counts = {4, 0, 3, 0, 1};
  const struct {
    int64_t want;
    uint32_t bin;
    int64_t above;
  } cases[] = {{1, 4, 0}, {2, 2, 1}, {4, 2, 1}, {5, 0, 4}, {8, 0, 4}};
  for (const auto& expected : cases) {
    const RadixBin found = find_bin(counts.data(), 5, expected.want);
    EXPECT_EQ(found.bin, expected.bin) << expected.want;
    EXPECT_EQ(found.above, expected.above) << expected.want;
    EXPECT_EQ(found.count, counts[expected.bin]) << expected.want;
  }
}

// The cut over several matrices (ops/across.h): histograms of the parts, added level by level, find the cut of the
// whole.
TEST(RadixSelect, HistogramsOfPartsAddUp) {
  std::mt19937 random(43);
  std::vector<uint32_t> keys(4000);
  for (uint32_t& key : keys) key = order_key(static_cast<float>(random() % 300) / 16.0f);
  for (int64_t k : {int64_t{1}, int64_t{1999}, int64_t{3999}, int64_t{4000}}) {
    Cut cut{0, k};
    for (int pass = 0; pass < kRadixPasses; ++pass) {
      std::vector<int64_t> counts(static_cast<size_t>(radix_bins(pass)));
      for (size_t part = 0; part < 4; ++part) {
        for (size_t i = part * 1000; i < (part + 1) * 1000; ++i) {
          if (radix_matches(keys[i], cut.key, pass)) ++counts[radix_bin(keys[i], pass)];
        }
      }
      const RadixBin found = find_bin(counts.data(), radix_bins(pass), cut.ties);
      cut.key |= found.bin << radix_digit(pass).shift;
      cut.ties -= found.above;
    }
    ASSERT_EQ(kept_by_cut(keys, cut), kept_by_sort(keys, k)) << "k " << k;
  }
}

}  // namespace
}  // namespace ace
