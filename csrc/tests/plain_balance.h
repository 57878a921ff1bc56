// balance_mean_ as plain loops over the formulas of core/balance.h.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "core/balance.h"

namespace ace {

// One row, its candidates and swaps in the order of their columns.
class PlainRow {
 public:
  PlainRow(std::vector<float> weight, const std::vector<float>& variance, const std::vector<float>& mean, bool* mask)
      : weight_(std::move(weight)), variance_(variance), mean_(mean), mask_(mask), cols_(size(weight_)) {
    double shift[kLanes] = {};
    float sizes[kLanes] = {};
    for (int64_t j = 0; j < cols_; ++j) {
      shift[j % kLanes] += mask_[j] ? 0.0 : of(j).shift;
      sizes[j % kLanes] += absolute(weight_[at(j)] * mean_[at(j)]);
    }
    s_ = fold_lanes(shift);
    shifts_ = shifts_bound(fold_lanes(sizes), cols_);
  }

  int64_t balance(int group_m, int64_t rounds) {
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t before = swaps_;
      find_candidates(group_m);
      while (group_m > 0 ? swap_pair() : swap_sides()) {
      }
      if (swaps_ == before) break;
    }
    return swaps_;
  }

 private:
  struct Pair {
    float change = std::numeric_limits<float>::infinity();
    int64_t restored = -1, removed = -1;
  };

  static int64_t size(const std::vector<float>& of) { return static_cast<int64_t>(of.size()); }
  static size_t at(int64_t j) { return static_cast<size_t>(j); }
  Removal of(int64_t j) const { return removal(weight_[at(j)], variance_[at(j)], mean_[at(j)]); }
  SearchTerms terms(int64_t j) const {
    return search_terms(weight_[at(j)], variance_[at(j)], mean_[at(j)], static_cast<float>(2.0 * s_));
  }

  // The best weight of [first, end) by `step`: to restore or to remove.
  void offer(int64_t first, int64_t end, int64_t step, Pair* back, Pair* out) const {
    for (int64_t j = first; j < end; j += step) {
      if (!mask_[j] && terms(j).if_restored() < back->change) *back = {terms(j).if_restored(), j, -1};
      if (mask_[j] && terms(j).if_removed() < out->change) *out = {terms(j).if_removed(), -1, j};
    }
  }

  void find_candidates(int group_m) {
    pairs_.clear();
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Pair best;
      if (group_m == 0) {
        Pair back, out;
        offer(lane, cols_, kLanes, &back, &out);
        best = {0.0f, back.restored, out.removed};
      }
      for (int64_t g = lane; group_m > 0 && g < cols_ / group_m; g += kLanes) {
        Pair back, out;
        offer(g * group_m, (g + 1) * group_m, 1, &back, &out);
        if (back.restored < 0 || out.removed < 0) continue;
        const float change = back.change + out.change;
        if (change < best.change) best = {change, back.restored, out.removed};
      }
      pairs_.push_back(best);
    }
  }

  // The column with the least change at s among one side's candidates.
  int64_t least(int64_t Pair::*side, double sign, double s) const {
    int64_t found = -1;
    for (const Pair& pair : pairs_) {
      const int64_t j = pair.*side;
      if (j < 0) continue;
      const double change = cost_change({sign * of(j).spread, sign * of(j).shift}, s);
      const double best = found < 0 ? 0.0 : cost_change({sign * of(found).spread, sign * of(found).shift}, s);
      if (found < 0 || change < best || (change == best && j < found)) found = j;
    }
    return found;
  }

  bool swap_sides() {
    const int64_t back = least(&Pair::restored, -1.0, s_);
    if (back < 0) return false;
    const int64_t out = least(&Pair::removed, 1.0, s_ - of(back).shift);
    if (out < 0 || !swap(back, out)) return false;
    for (Pair& pair : pairs_) {
      if (pair.restored == back) pair.restored = -1;
      if (pair.removed == out) pair.removed = -1;
    }
    return true;
  }

  bool swap_pair() {
    const auto change = [&](const Pair& pair) {
      return cost_change(exchange(of(pair.removed), of(pair.restored)), s_);
    };
    Pair* best = nullptr;
    for (Pair& pair : pairs_) {
      if (pair.restored < 0) continue;
      if (!best || change(pair) < change(*best) || (change(pair) == change(*best) && pair.restored < best->restored)) {
        best = &pair;
      }
    }
    if (!best || !swap(best->restored, best->removed)) return false;
    best->restored = -1;
    return true;
  }

  bool swap(int64_t restored, int64_t removed) {
    const Removal added = exchange(of(removed), of(restored));
    const double spreads = of(removed).spread + of(restored).spread;
    if (!(cost_change(added, s_) < -balance_rounding(spreads, added.shift, shifts_, cols_, swaps_))) return false;
    std::swap(mask_[restored], mask_[removed]);
    s_ += added.shift;
    ++swaps_;
    return true;
  }

  std::vector<float> weight_;
  const std::vector<float>&variance_, &mean_;
  bool* mask_;
  int64_t cols_, swaps_ = 0;
  double s_ = 0.0, shifts_ = 0.0;
  std::vector<Pair> pairs_;
};

}  // namespace ace
