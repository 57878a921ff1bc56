// N:M selection of one group against a stable sort, for every N and M.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "core/nm_select.h"

namespace ace {
namespace {

// A stable sort, best key first, leaves the lower column first among equal keys.
uint32_t kept_by_sort(const std::vector<uint32_t>& keys, int keep_n) {
  std::vector<int> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] > keys[b]; });
  uint32_t kept = 0;
  for (int i = 0; i < keep_n; ++i) kept |= 1u << order[i];
  return kept;
}

template <int kGroup>
void expect_all_n(int group_m, std::mt19937& random) {
  for (uint32_t distinct : {1u, 2u, 3u, 0xffffffffu}) {  // few distinct keys make many ties
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<uint32_t> keys(group_m);
      for (uint32_t& key : keys) key = random() % distinct;
      for (int keep_n = 0; keep_n <= group_m; ++keep_n) {
        ASSERT_EQ(keep_best<kGroup>(keys.data(), group_m, keep_n), kept_by_sort(keys, keep_n))
            << keep_n << ":" << group_m << " of " << testing::PrintToString(keys);
      }
    }
  }
}

TEST(NmSelect, EveryNAndM) {
  std::mt19937 random(17);
  for (int group_m = 1; group_m <= kMaxGroup; ++group_m) expect_all_n<0>(group_m, random);
}

TEST(NmSelect, FixedSizesAgree) {
  std::mt19937 random(19);
  expect_all_n<2>(2, random);
  expect_all_n<4>(4, random);
  expect_all_n<8>(8, random);
  expect_all_n<16>(16, random);
  expect_all_n<32>(32, random);
}

TEST(NmSelect, EveryOrderOfFourKeysWithTies) {
  std::vector<uint32_t> keys(4);
  for (uint32_t code = 0; code < 256; ++code) {
    for (int i = 0; i < 4; ++i) keys[i] = code >> (2 * i) & 3u;
    for (int keep_n = 0; keep_n <= 4; ++keep_n) {
      ASSERT_EQ(keep_best<4>(keys.data(), 4, keep_n), kept_by_sort(keys, keep_n)) << "code " << code;
    }
  }
}

TEST(NmSelect, EdgesOfTheKeys) {
  const std::vector<uint32_t> keys = {0xffffffffu, 0u, 0xffffffffu, 0u};
  EXPECT_EQ(keep_best<4>(keys.data(), 4, 1), 0b0001u);
  EXPECT_EQ(keep_best<4>(keys.data(), 4, 2), 0b0101u);
  EXPECT_EQ(keep_best<4>(keys.data(), 4, 3), 0b0111u);
}

}  // namespace
}  // namespace ace
