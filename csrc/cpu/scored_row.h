// The scores of one row of a weight, as floats or as ordered keys, recomputed whenever they are read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/order_key.h"
#include "core/score.h"
#include "cpu/multiversion.h"

namespace ace::cpu {

// A weight as an integer of its size: kept weights keep their bits, and +0.0 is 0 in every type.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// One row of a scored weight, as pointers.
template <class T>
struct ScoredRow {
  const T* weight;          // [cols]
  const float* column;      // [cols] or null
  const float* moment;      // [cols] or null
  const float* column_sum;  // [cols] or null
  float row_sum;
  int64_t cols;
};

template <class F, class T>
ACE_HD ScoreTerms score_terms(const ScoredRow<T>& row, int64_t j) {
  return {F::kColumn ? row.column[j] : 0.0f, F::kMoment ? row.moment[j] : 0.0f, row.row_sum,
          F::kSums ? row.column_sum[j] : 0.0f};
}

template <class F, class T>
ACE_HD float score_at(const ScoredRow<T>& row, int64_t j) {
  return F::value(to_float(row.weight[j]), score_terms<F>(row, j));
}

// keys[j] of the whole row. False if a score is not finite.
template <class F, class T>
ACE_MULTIVERSION bool row_keys(ScoredRow<T> row, uint32_t* keys) {
  uint32_t bad = 0;
  for (int64_t j = 0; j < row.cols; ++j) {
    const float score = score_at<F>(row, j);
    bad |= static_cast<uint32_t>(!is_finite(score));
    keys[j] = order_key(score);
  }
  return bad == 0;
}

template <class F, class T>
ACE_MULTIVERSION bool row_is_finite(ScoredRow<T> row) {
  uint32_t bad = 0;
  for (int64_t j = 0; j < row.cols; ++j) bad |= static_cast<uint32_t>(!is_finite(score_at<F>(row, j)));
  return bad == 0;
}

template <class F, class T>
ACE_MULTIVERSION void row_scores(ScoredRow<T> row, float* scores) {
  for (int64_t j = 0; j < row.cols; ++j) scores[j] = score_at<F>(row, j);
}

// The value of a weight that is given as itself or as its bits.
ACE_HD float weight_value(uint32_t bits, float) { return bits_float(bits); }
ACE_HD float weight_value(uint16_t bits, Half) { return to_float(Half{bits}); }
ACE_HD float weight_value(uint16_t bits, BFloat16) { return to_float(BFloat16{bits}); }
ACE_HD float weight_value(float weight, float) { return weight; }
ACE_HD float weight_value(Half weight, Half) { return to_float(weight); }
ACE_HD float weight_value(BFloat16 weight, BFloat16) { return to_float(weight); }

ACE_HD uint32_t size_bits(float value) { return float_bits(value) & 0x7fffffffu; }
ACE_HD uint16_t size_bits(Half value) { return value.bits & 0x7fffu; }
ACE_HD uint16_t size_bits(BFloat16 value) { return value.bits & 0x7fffu; }

// The largest |value| of n, with infinity above all numbers and NaN above infinity: absolute values have the order of
// their bits.
template <class T>
ACE_MULTIVERSION float largest_size(const T* values, int64_t n) {
  Bits<T> largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    const Bits<T> size = size_bits(values[j]);
    largest = size > largest ? size : largest;
  }
  return weight_value(largest, T{});
}

}  // namespace ace::cpu
