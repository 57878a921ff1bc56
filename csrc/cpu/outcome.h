// What a selection does with a row: prune the weight in place, or write a mask and only read the weight. The selection
// loops are written once for both:
//   put(j, kept)       column j is kept or removed.
//   from(j)            the same row without its first j columns.
//   scored(scores, n)  a row with these finite scores, which the formula Scored reads.
//   weights(row)       where to read the weights of `row`. Pruning reads and writes through one pointer; with two, the
//                      compiler would have to assume aliasing and could not vectorise.
#pragma once

#include "cpu/scored_row.h"

namespace ace::cpu {

template <class T>
struct PruneRow {
  using Scored = GivenScore;
  Bits<T>* weight;  // [cols]

  ACE_HD void put(int64_t j, bool kept) const { weight[j] = kept ? weight[j] : Bits<T>{0}; }
  ACE_HD PruneRow from(int64_t j) const { return {weight + j}; }
  ScoredRow<T> scored(const float* scores, int64_t cols) const {
    return {nullptr, nullptr, scores, nullptr, 0.0f, cols};
  }
  ACE_HD const Bits<T>* weights(const ScoredRow<T>&) const { return weight; }
};

// For a row of scores in place of weights.
struct OwnScore {
  static constexpr bool kColumn = false, kMoment = false, kSums = false;
  static ACE_HD float value(float weight, const ScoreTerms&) { return weight; }
};

struct MaskRow {
  using Scored = OwnScore;
  bool* mask;  // [cols]

  ACE_HD void put(int64_t j, bool kept) const { mask[j] = kept; }
  ACE_HD MaskRow from(int64_t j) const { return {mask + j}; }
  static ScoredRow<float> scored(const float* scores, int64_t cols) {
    return {scores, nullptr, nullptr, nullptr, 0.0f, cols};
  }
  template <class T>
  ACE_HD const T* weights(const ScoredRow<T>& row) const {
    return row.weight;
  }
};

// Keeps the scores of `row` whose key is not below `lowest`.
template <class F, class T, class Out>
ACE_MULTIVERSION void keep_from_key(ScoredRow<T> row, Out out, uint32_t lowest) {
  for (int64_t j = 0; j < row.cols; ++j) {
    out.put(j, order_key(F::value(weight_value(out.weights(row)[j], T{}), score_terms<F>(row, j))) >= lowest);
  }
}

}  // namespace ace::cpu
