// balance_mean_ of one row: rounds of a scan and swaps.
#pragma once

#include <vector>

#include "cpu/balance_search.h"
#include "cpu/nm_rows.h"

namespace ace::cpu {

// Runs rounds until one swaps nothing.
template <class T>
class RowBalancer {
 public:
  RowBalancer(const float* variance, const float* mean, int64_t cols, int group_m)
      : group_m_(group_m),
        wide_mean_(mean, mean + cols),
        variance_(group_m > 0 ? by_place(variance, cols, group_m) : std::vector<float>{}),
        mean_(group_m > 0 ? by_place(mean, cols, group_m) : std::vector<float>{}) {}

  BalanceState start(const BalanceRow<T>& row) const { return start_balance(row, wide_mean_.data()); }

  // Begins with the state of start(); returns the number of swaps.
  int64_t balance(const BalanceRow<T>& row, BalanceState state, int64_t rounds) const {
    for (; rounds > 0; --rounds) {
      const int64_t made = state.swaps;
      const float twice_shift = static_cast<float>(2.0 * state.shift);
      if (group_m_ > 0) {
        swap_in_groups(row, twice_shift, &state);
      } else {
        swap_in_row(row, twice_shift, &state);
      }
      if (state.swaps == made) break;
    }
    return state.swaps;
  }

 private:
  void swap_in_row(const BalanceRow<T>& row, float twice_shift, BalanceState* state) const {
    LaneBest back, out;
    scan_columns(row, twice_shift, &back, &out);
    Offers restored, removed;
    clear(&restored), clear(&removed);
    for (int l = 0; l < kLanes; ++l) {
      const int64_t j = int64_t{back.stretch[l]} * kLanes + l, i = int64_t{out.stretch[l]} * kLanes + l;
      if (back.change[l] < kNoChange) restored.put(l, exchange({0.0, 0.0}, row.at(j)), j);
      if (out.change[l] < kNoChange) removed.put(l, row.at(i), i);
    }
    swap_offers(row, restored, removed, state);
  }

  void swap_in_groups(const BalanceRow<T>& row, float twice_shift, BalanceState* state) const {
    const PlacedMoments moments{variance_.data(), mean_.data()};
    LaneBest best;
    int32_t places[kLanes];
    switch (group_m_) {
      case 4: scan_groups<4>(row, moments, group_m_, twice_shift, &best, places); break;
      case 8: scan_groups<8>(row, moments, group_m_, twice_shift, &best, places); break;
      default: scan_groups<0>(row, moments, group_m_, twice_shift, &best, places);
    }
    Offers pairs;
    clear(&pairs);
    double spreads[kLanes];
    int64_t removed[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t first = (int64_t{best.stretch[l]} * kLanes + l) * group_m_;
      if (!(best.change[l] < kNoChange)) continue;
      removed[l] = first + places[l] % kMaxGroup;
      const Removal out = row.at(removed[l]), back = row.at(first + places[l] / kMaxGroup);
      pairs.put(l, exchange(out, back), first + places[l] / kMaxGroup);
      spreads[l] = out.spread + back.spread;
    }
    swap_pairs(row, pairs, spreads, removed, state);
  }

  int group_m_;
  std::vector<double> wide_mean_;
  std::vector<float> variance_, mean_;  // in the order of by_place; empty without groups
};

}  // namespace ace::cpu
