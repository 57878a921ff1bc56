// N:M selection of a whole row in one pass. For small groups, plain loops over groups that the compiler vectorises with
// one group for each lane: each pair of a group is compared once, and only weights are shuffled.
#pragma once

#include <cstring>
#include <vector>

#include "core/nm_select.h"
#include "cpu/outcome.h"

namespace ace::cpu {

// [cols] reordered as [group_m][cols / group_m], so that the lanes of a vector, one for each group, read contiguous
// values.
inline std::vector<float> by_place(const float* values, int64_t cols, int group_m) {
  const int64_t groups = cols / group_m;
  std::vector<float> out(static_cast<size_t>(values ? cols : 0));
  for (size_t j = 0; j < out.size(); ++j) {
    const int64_t g = static_cast<int64_t>(j) / group_m, place = static_cast<int64_t>(j) % group_m;
    out[static_cast<size_t>(place * groups + g)] = values[j];
  }
  return out;
}

// The weights of one group. 16-bit weights are handled in pairs, as 32-bit words, so that lanes are as wide as those of
// their scores.
template <class T, int kGroup>
struct GroupWeights {
  static constexpr bool kPairs = sizeof(T) == 2;
  static constexpr int kWords = kPairs ? kGroup / 2 : kGroup;
  uint32_t word[kWords];

  ACE_HD void load(const void* from) {
    ACE_UNROLL
    for (int i = 0; i < kWords; ++i) std::memcpy(&word[i], static_cast<const char*>(from) + 4 * i, sizeof(uint32_t));
  }

  ACE_HD void store(void* to) const {
    ACE_UNROLL
    for (int i = 0; i < kWords; ++i) std::memcpy(static_cast<char*>(to) + 4 * i, &word[i], sizeof(uint32_t));
  }

  ACE_HD T weight(int i) const {
    if constexpr (kPairs) {
      return T{static_cast<uint16_t>(i % 2 == kFirst ? word[i / 2] : word[i / 2] >> 16)};
    } else {
      return bits_float(word[i]);
    }
  }

  ACE_HD void zero_unless(const bool* kept) {
    ACE_UNROLL
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kPairs) {
        word[i] &= (kept[2 * i + kFirst] ? 0xffffu : 0u) | (kept[2 * i + 1 - kFirst] ? 0xffff0000u : 0u);
      } else {
        word[i] = kept[i] ? word[i] : 0u;
      }
    }
  }

 private:
  // Which weight of a pair is the word's low half.
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  static constexpr int kFirst = 1;
#else
  static constexpr int kFirst = 0;
#endif
};

template <int kGroup, class T>
ACE_HD void put_group(const PruneRow<T>& out, int64_t first, GroupWeights<T, kGroup> group, const bool* kept) {
  group.zero_unless(kept);
  group.store(out.weight + first);
}

template <int kGroup, class T>
ACE_HD void put_group(const MaskRow& out, int64_t first, const GroupWeights<T, kGroup>&, const bool* kept) {
  ACE_UNROLL
  for (int i = 0; i < kGroup; ++i) out.put(first + i, kept[i]);
}

// Keeps the best keep_n of each group of kGroup, computing scores and writing weights in one pass. `row.column` in
// by_place's order.
template <int kGroup, class F, class T, class Out>
ACE_MULTIVERSION void keep_best_of_row(ScoredRow<T> row, Out out, int keep_n) {
  static_assert(!F::kSums, "such scores are computed first");
  const int64_t groups = row.cols / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    GroupWeights<T, kGroup> group;
    group.load(out.weights(row) + kGroup * g);
    float score[kGroup];
    ACE_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const ScoreTerms terms{F::kColumn ? row.column[i * groups + g] : 0.0f,
                             F::kMoment ? row.moment[kGroup * g + i] : 0.0f, 0.0f, 0.0f};
      score[i] = F::value(to_float(group.weight(i)), terms);
    }
    int rank[kGroup] = {};  // how many come before it: higher scores, and equal scores of lower columns
    ACE_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      ACE_UNROLL
      for (int j = i + 1; j < kGroup; ++j) {
        const int first = score[i] >= score[j];
        rank[j] += first;
        rank[i] += 1 - first;
      }
    }
    bool kept[kGroup];
    ACE_UNROLL
    for (int i = 0; i < kGroup; ++i) kept[i] = rank[i] < keep_n;
    put_group(out, kGroup * g, group, kept);
  }
}

// The same for any formula: first computes the row's scores into `scores` [cols], so that one selection serves all
// formulas.
template <int kGroup, class F, class T, class Out>
void keep_best_of_scored_row(const ScoredRow<T>& row, Out out, int keep_n, float* scores) {
  row_scores<F>(row, scores);
  keep_best_of_row<kGroup, typename Out::Scored>(out.scored(scores, row.cols), out, keep_n);
}

// Whether to compile the one-pass version, which is slow to compile: only for the formulas that pruning uses most.
template <class F, class Out>
constexpr bool kOnePass = !F::kMoment && !F::kSums && !std::is_same_v<Out, MaskRow>;

}  // namespace ace::cpu
