// The scan of a row for balance_mean_'s candidates, one for each lane. Plain loops that the compiler vectorises.
// Formulas: core/balance.h.
#pragma once

#include "core/nm_select.h"
#include "cpu/balance_offers.h"
#include "cpu/choose.h"

namespace ace::cpu {

constexpr float kNoChange = std::numeric_limits<float>::infinity();  // of a lane without a candidate

// The least change of each lane, and the stretch of kLanes columns or groups where it was found.
struct LaneBest {
  float change[kLanes];
  int32_t stretch[kLanes];
};

ACE_HD void clear(LaneBest* best) {
  for (int l = 0; l < kLanes; ++l) best->change[l] = kNoChange, best->stretch[l] = 0;
}

// s, and a bound on the sum of |b|, which is not finite if a weight is not. `mean` [cols] is the mean in float64.
template <class T>
ACE_MULTIVERSION BalanceState start_balance(const BalanceRow<T>& row, const double* ACE_RESTRICT mean) {
  double shift[kLanes] = {};
  float size[kLanes] = {};
  const T* ACE_RESTRICT weight = row.weight;
  const float* ACE_RESTRICT narrow_mean = row.mean;
  const uint8_t* ACE_RESTRICT mask = bytes(row.mask);
  const auto add = [&](int64_t j, int l) __attribute__((always_inline)) {
    const float w = to_float(weight[j]);
    shift[l] += static_cast<double>(choose(all_bits(mask[j]), 0.0f, w)) * mean[j];
    size[l] += absolute(w * narrow_mean[j]);
  };
  int64_t j = 0;
  for (; j + kLanes <= row.cols; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) add(j + l, l);
  }
  for (int l = 0; j + l < row.cols; ++l) add(j + l, l);
  return {fold_lanes(shift), shifts_bound(fold_lanes(size), row.cols), 0};
}

// Takes the other candidate in lanes where it changes the cost less.
ACE_HD void keep_least(float change, int32_t stretch, float* least, int32_t* where) {
  const uint32_t less = all_bits(change < *least);
  *least = choose(less, change, *least);
  *where = static_cast<int32_t>((static_cast<uint32_t>(stretch) & less) | (static_cast<uint32_t>(*where) & ~less));
}

// The best weight of each lane to restore and to remove.
template <class T>
ACE_MULTIVERSION void scan_columns(const BalanceRow<T>& row, float twice_shift, LaneBest* restored, LaneBest* removed) {
  const T* ACE_RESTRICT weight = row.weight;
  const float *ACE_RESTRICT variance = row.variance, *ACE_RESTRICT mean = row.mean;
  const uint8_t* ACE_RESTRICT mask = bytes(row.mask);
  LaneBest back, out;
  clear(&back), clear(&out);
  const auto offer = [&](int64_t j, int l, int32_t stretch) __attribute__((always_inline)) {
    const SearchTerms terms = search_terms(to_float(weight[j]), variance[j], mean[j], twice_shift);
    const uint32_t kept = all_bits(mask[j]);
    keep_least(choose(kept, kNoChange, terms.if_restored()), stretch, &back.change[l], &back.stretch[l]);
    keep_least(choose(kept, terms.if_removed(), kNoChange), stretch, &out.change[l], &out.stretch[l]);
  };
  int64_t j = 0;
  int32_t stretch = 0;
  for (; j + kLanes <= row.cols; j += kLanes, ++stretch) {
    for (int l = 0; l < kLanes; ++l) offer(j + l, l, stretch);
  }
  for (int l = 0; j + l < row.cols; ++l) offer(j + l, l, stretch);
  *restored = back;
  *removed = out;
}

// The column vectors in the order of by_place (cpu/nm_rows.h): by place in the group, then by group.
struct PlacedMoments {
  const float* variance;
  const float* mean;
};

// The best pair among each lane's groups: in each group the best weight to restore and the best to remove. `places`
// holds the two columns within the group, the removed one as the remainder of kMaxGroup. kGroup 0: any group_m.
template <int kGroup, class T>
ACE_MULTIVERSION void scan_groups(const BalanceRow<T>& row, const PlacedMoments& moments, int group_m,
                                  float twice_shift, LaneBest* pairs, int32_t* places) {
  const int64_t m = kGroup > 0 ? kGroup : group_m, groups = row.cols / m;
  const T* ACE_RESTRICT weight = row.weight;
  const uint8_t* ACE_RESTRICT mask = bytes(row.mask);
  const float *ACE_RESTRICT variance = moments.variance, *ACE_RESTRICT mean = moments.mean;
  LaneBest best;
  int32_t best_places[kLanes] = {};
  clear(&best);
  const auto offer = [&](int64_t group, int l, int32_t stretch) __attribute__((always_inline)) {
    float back = kNoChange, out = kNoChange;
    int32_t back_at = 0, out_at = 0;
    ACE_UNROLL
    for (int32_t k = 0; k < m; ++k) {
      const int64_t j = group * m + k, at = k * groups + group;
      const SearchTerms terms = search_terms(to_float(weight[j]), variance[at], mean[at], twice_shift);
      const uint32_t kept = all_bits(mask[j]);
      const float if_restored = choose(kept, kNoChange, terms.if_restored());
      const float if_removed = choose(kept, terms.if_removed(), kNoChange);
      keep_least(if_restored, k, &back, &back_at);
      keep_least(if_removed, k, &out, &out_at);
    }
    const float change = back + out;
    float least = best.change[l];
    keep_least(change, back_at * kMaxGroup + out_at, &least, &best_places[l]);
    keep_least(change, stretch, &best.change[l], &best.stretch[l]);
  };
  int64_t group = 0;
  int32_t stretch = 0;
  for (; group + kLanes <= groups; group += kLanes, ++stretch) {
    for (int l = 0; l < kLanes; ++l) offer(group + l, l, stretch);
  }
  for (int l = 0; group + l < groups; ++l) offer(group + l, l, stretch);
  *pairs = best;
  for (int l = 0; l < kLanes; ++l) places[l] = best_places[l];
}

}  // namespace ace::cpu
