// The candidates of one round of balance_mean_, and the swaps among them. Formulas: core/balance.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/balance.h"
#include "cpu/multiversion.h"

namespace ace::cpu {

constexpr double kNever = std::numeric_limits<double>::infinity();

// One row of the problem.
template <class T>
struct BalanceRow {
  const T* weight;
  const float* variance;
  const float* mean;
  bool* mask;  // true where kept
  int64_t cols;

  Removal at(int64_t j) const { return removal(to_float(weight[j]), variance[j], mean[j]); }
};

// The state of a row after its swaps.
struct BalanceState {
  double shift;   // s
  double shifts;  // a bound of the sum of |b| over the row
  int64_t swaps;
};

// One candidate for each lane: what it would add to the removed weights, and its column; spread is kNever if the lane
// has none.
struct Offers {
  double spread[kLanes], shift[kLanes];
  double order[kLanes];  // column * kLanes + lane, exact in float64, so that all vectors have lanes of one width

  Removal added(int l) const { return {spread[l], shift[l]}; }
  int64_t column(int l) const { return static_cast<int64_t>(order[l]) / kLanes; }
  void put(int l, const Removal& value, int64_t column) {
    spread[l] = value.spread;
    shift[l] = value.shift;
    order[l] = static_cast<double>(column * kLanes + l);
  }
};

// No lane has a candidate; any lane may be set.
inline void clear(Offers* offers) {
  for (int l = 0; l < kLanes; ++l) offers->put(l, {kNever, 0.0}, 0);
}

// Removes a candidate. Whole vectors are stored, so that the next vector load does not stall on a partial store.
ACE_HD void drop(Offers* offers, int lane) {
  for (int l = 0; l < kLanes; ++l) offers->spread[l] = l == lane ? kNever : offers->spread[l];
}

constexpr int kMinima = 8;  // one vector

// The least value over the lanes.
ACE_HD double least_of(const double* value) {
  double least[kMinima];
  for (int k = 0; k < kMinima; ++k) least[k] = value[k];
  for (int l = kMinima; l < kLanes; l += kMinima) {
    for (int k = 0; k < kMinima; ++k) least[k] = value[l + k] < least[k] ? value[l + k] : least[k];
  }
  for (int half = kMinima / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) least[k] = least[k + half] < least[k] ? least[k + half] : least[k];
  }
  return least[0];
}

// The lane with the least change at the shift s, the lower column among equals; -1 if there is no candidate.
ACE_HD int least_offer(const Offers& offers, double s) {
  double change[kLanes], order[kLanes];
  for (int l = 0; l < kLanes; ++l) change[l] = cost_change({offers.spread[l], offers.shift[l]}, s);
  const double least = least_of(change);
  if (!(least < kNever)) return -1;
  for (int l = 0; l < kLanes; ++l) order[l] = change[l] == least ? offers.order[l] : kNever;
  return static_cast<int>(static_cast<int64_t>(least_of(order)) % kLanes);
}

// Whether adding this certainly lowers the cost; `spreads` is the sum of the spreads that it was made from.
inline bool lowers_cost(const Removal& added, double spreads, const BalanceState& state, int64_t cols) {
  const double rounding = balance_rounding(spreads, added.shift, state.shifts, cols, state.swaps);
  return cost_change(added, state.shift) < -rounding;
}

template <class T>
void swap_columns(const BalanceRow<T>& row, int64_t restored, int64_t removed, double shift, BalanceState* state) {
  row.mask[restored] = true;
  row.mask[removed] = false;
  state->shift += shift;
  ++state->swaps;
}

// Swaps the best candidates of both sides, each once, while a swap gains.
template <class T>
ACE_MULTIVERSION void swap_offers(const BalanceRow<T>& row, Offers& restored, Offers& removed, BalanceState* state) {
  for (;;) {
    const int back = least_offer(restored, state->shift);
    if (back < 0) return;
    const int out = least_offer(removed, state->shift + restored.shift[back]);
    if (out < 0) return;
    const Removal added{removed.spread[out] + restored.spread[back], removed.shift[out] + restored.shift[back]};
    if (!lowers_cost(added, removed.spread[out] - restored.spread[back], *state, row.cols)) return;
    swap_columns(row, restored.column(back), removed.column(out), added.shift, state);
    drop(&restored, back);
    drop(&removed, out);
  }
}

// Swaps pairs, each once, while a swap gains. `pairs` has their restored columns.
template <class T>
ACE_MULTIVERSION void swap_pairs(const BalanceRow<T>& row, Offers& pairs, const double* spreads, const int64_t* removed,
                                 BalanceState* state) {
  for (;;) {
    const int best = least_offer(pairs, state->shift);
    if (best < 0 || !lowers_cost(pairs.added(best), spreads[best], *state, row.cols)) return;
    swap_columns(row, pairs.column(best), removed[best], pairs.shift[best], state);
    drop(&pairs, best);
  }
}

}  // namespace ace::cpu
