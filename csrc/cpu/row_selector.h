// Selects within rows, one after another, each read and written once. Holds what one thread keeps between rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/row_places.h"
#include "cpu/row_select.h"

namespace ace::cpu {

// Keeps the best keep_k of each row in the order of core/radix_select.h. Scores must be finite.
//
// Usually, scores are quantised to 16-bit bins (row_places.h) on a scale around an earlier cut, counts find the bin of
// this row's cut, and lower bins are removed. Scores in the cut's own bin, few if any, are then distinguished by their
// keys. A row that does not fit the scale (the first row, a row with a different range, many ties at the cut) is
// selected by its keys and sets a new scale.
template <class F, class T>
class RowSelector {
 public:
  RowSelector(int64_t cols, int64_t keep_k)
      : cols_(cols), keep_k_(keep_k), keys_(static_cast<size_t>(cols)), places_(static_cast<size_t>(cols)) {}

  // Writes `out`; returns the smallest kept score, +inf if none is kept.
  template <class Out>
  float select(const ScoredRow<T>& row, const Out& out) {
    if (!has_scale_) return select_by_keys(row, out);
    row_places<F>(row, scale_, places_.data());
    const auto count = [&](int64_t at) { return count_places(places_.data(), cols_, static_cast<uint16_t>(at)); };
    const Bracket cut = search_places(count, cols_, keep_k_, 0, &hint_);
    const bool crowded = cut.from_low > keep_k_ && cut.from_low - cut.from_high > kCrowd;
    const bool outside = cut.low == 0 || cut.low == kPlaces - 1;
    return crowded || outside ? select_by_keys(row, out) : select_by_places(row, out, cut);
  }

 private:
  static constexpr int64_t kCrowd = 128;  // above, resolving ties costs more than a search by keys

  struct Candidate {
    uint32_t key;
    int64_t column;
  };

  template <class Out>
  float select_by_places(const ScoredRow<T>& row, const Out& out, const Bracket& cut) {
    const uint16_t place = keep_from_place(out, places_.data(), cols_, static_cast<uint16_t>(cut.low));
    candidates_.clear();
    for (int64_t j = 0; (j = next_within(places_.data(), j, cols_, place, place + 1)) < cols_; ++j) {
      candidates_.push_back({order_key(score_at<F>(row, j)), j});
    }
    // The lowest kept place holds the last kept columns, and the surplus to drop if it holds too many.
    const auto last = candidates_.begin() + (cut.from_low - keep_k_);
    std::nth_element(candidates_.begin(), last, candidates_.end(), [](const Candidate& a, const Candidate& b) {
      return a.key != b.key ? a.key < b.key : a.column > b.column;
    });
    const float threshold = key_score(last->key);
    for (auto dropped = candidates_.begin(); dropped != last; ++dropped) out.put(dropped->column, false);
    return threshold;
  }

  template <class Out>
  float select_by_keys(const ScoredRow<T>& row, const Out& out) {
    row_keys<F>(row, keys_.data());
    const Cut cut = search_kth(keys_.data(), cols_, keep_k_, &key_hint_);
    const float threshold = cut_threshold(cut);
    if (keep_k_ > 0 && keep_k_ < cols_) set_scale(row, threshold);
    apply_cut(out, keys_.data(), cols_, cut);
    return threshold;
  }

  // From one mean distance below the cut to one above it, estimated from a sample of the row.
  void set_scale(const ScoredRow<T>& row, float threshold) {
    const int64_t stride = 1 + cols_ / 256;
    double sum = 0.0, count = 0.0;
    for (int64_t j = 0; j < cols_; j += stride, ++count) {
      sum += std::abs(static_cast<double>(score_at<F>(row, j)) - static_cast<double>(threshold));
    }
    const float low = static_cast<float>(threshold - sum / count), high = static_cast<float>(threshold + sum / count);
    has_scale_ = low < high && is_finite(low) && is_finite(high) && is_finite(high - low);
    scale_ = has_scale_ ? place_scale(low, high) : PlaceScale{};
    hint_ = PlaceHint{};
  }

  int64_t cols_, keep_k_;
  uint32_t key_hint_ = order_key(1.0f);
  bool has_scale_ = false;
  PlaceScale scale_{};
  PlaceHint hint_;
  std::vector<uint32_t> keys_;
  std::vector<uint16_t> places_;
  std::vector<Candidate> candidates_;
};

}  // namespace ace::cpu
