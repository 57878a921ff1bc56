// The vectorised selections of a row against those of the core, which define the result.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <vector>

#include "cpu/row_select.h"
#include "tests/select_kth.h"

namespace ace::cpu {
namespace {

// Keys of finite scores: few distinct keys make ties; wide ones cover both signs and all exponents.
std::vector<uint32_t> make_keys(int64_t n, uint32_t distinct, std::mt19937& random) {
  std::vector<uint32_t> keys(static_cast<size_t>(n));
  for (uint32_t& key : keys) {
    float score = 0.0f;
    do score = bits_float(random());
    while (!is_finite(score));
    key = order_key(distinct == 0 ? score : static_cast<float>(random() % distinct) - 1.0f);
  }
  return keys;
}

// What a cut keeps, one entry for each key.
std::vector<bool> kept_by(const std::vector<uint32_t>& keys, Cut cut) {
  std::vector<bool> kept;
  for (const uint32_t key : keys) kept.push_back(key > cut.key || (key == cut.key && cut.ties-- > 0));
  return kept;
}

TEST(RowSelect, SearchKeepsWhatTheRadixSelectionKeeps) {
  std::mt19937 random(5);
  std::vector<uint32_t> counts(kRadixBins);
  for (const int64_t n : {1, 2, 15, 16, 17, 100, 1134, 5000}) {
    for (const uint32_t distinct : {0u, 1u, 2u, 7u, 1000u}) {
      const std::vector<uint32_t> keys = make_keys(n, distinct, random);
      std::vector<uint32_t> scratch(keys.size());
      for (const int64_t keep_k : {int64_t{0}, int64_t{1}, n / 3, n / 2, n - 1, n}) {
        const Cut expected = select_kth(keys.data(), n, keep_k, scratch.data(), counts.data());
        for (uint32_t hint : {0u, order_key(1.0f), order_key(-1e30f), 0xffffffffu, keys[0]}) {
          const Cut cut = search_kth(keys.data(), n, keep_k, &hint);
          ASSERT_EQ(kept_by(keys, cut), kept_by(keys, expected)) << n << " " << distinct << " " << keep_k;
          ASSERT_EQ(float_bits(cut_threshold(cut)), float_bits(cut_threshold(expected)));
        }
      }
    }
  }
}

template <class T>
void expect_groups_as_the_core(int group_m, std::mt19937& random) {
  const int64_t cols = int64_t{group_m} * 37;  // does not fill the last vector
  for (const uint32_t distinct : {0u, 2u, 5u}) {
    const std::vector<uint32_t> keys = make_keys(cols, distinct, random);
    for (int keep_n = 0; keep_n <= group_m; ++keep_n) {
      std::vector<Bits<T>> weight(keys.size(), 0x8001);
      const std::unique_ptr<bool[]> mask(new bool[keys.size()]);
      keep_best_of_groups(PruneRow<T>{weight.data()}, keys.data(), cols, group_m, keep_n);
      keep_best_of_groups(MaskRow{mask.get()}, keys.data(), cols, group_m, keep_n);
      for (int64_t j = 0; j < cols; j += group_m) {
        const uint32_t kept = keep_best<0>(keys.data() + j, group_m, keep_n);
        for (int g = 0; g < group_m; ++g) {
          const size_t at = static_cast<size_t>(j + g);
          ASSERT_EQ(weight[at], (kept >> g & 1u) != 0 ? 0x8001 : 0) << keep_n << ":" << group_m;
          ASSERT_EQ(mask[at], (kept >> g & 1u) != 0) << keep_n << ":" << group_m;
        }
      }
    }
  }
}

TEST(RowSelect, GroupsKeepWhatTheCoreKeeps) {
  std::mt19937 random(6);
  for (const int group_m : {1, 2, 3, 4, 5, 8, 16, 32}) {
    expect_groups_as_the_core<BFloat16>(group_m, random);
    expect_groups_as_the_core<float>(group_m, random);
  }
}

}  // namespace
}  // namespace ace::cpu
