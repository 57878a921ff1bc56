// Scores of a weight's rows as ordered keys, recomputed whenever they are read: a row's keys live in a thread's buffer.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "check.h"
#include "core/order_key.h"
#include "core/score.h"
#include "cpu/dispatch.h"
#include "cpu/multiversion.h"

namespace ace {

// Sums of |W| for the ria score, float64 rounded once.
struct ScoreSums {
  std::vector<float> row;     // [rows]
  std::vector<float> column;  // [cols]
};

ScoreSums score_sums(const at::Tensor& weight);

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
ACE_HD float score_at(const ScoredRow<T>& row, int64_t j) {
  const ScoreTerms terms{F::kColumn ? row.column[j] : 0.0f, F::kMoment ? row.moment[j] : 0.0f, row.row_sum,
                         F::kSums ? row.column_sum[j] : 0.0f};
  return F::value(to_float(row.weight[j]), terms);
}

// keys[j] of the whole row. False where a score is not finite.
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

// A checked weight with all that its formula reads.
template <class F, class T>
class ScoredMatrix {
 public:
  using Formula = F;
  using Scalar = T;

  ScoredMatrix(std::string_view op, const at::Tensor& weight, const OptionalTensor& column,
               const OptionalTensor& moment)
      : op_(op), weight_(weight), column_(column), moment_(moment), rows_(weight.size(0)), cols_(weight.size(1)) {
    if (F::kSums) sums_ = score_sums(weight);
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  ScoredRow<T> row(int64_t i) const {
    return {data<T>(weight_) + i * weight_.stride(0),
            F::kColumn ? data<float>(*column_) : nullptr,
            F::kMoment ? data<float>(*moment_) + i * cols_ : nullptr,
            F::kSums ? sums_.column.data() : nullptr,
            F::kSums ? sums_.row[static_cast<size_t>(i)] : 0.0f,
            cols_};
  }

  // The row to write, seen as integers of the weight's size.
  template <class Bits>
  Bits* mutable_row(int64_t i) const {
    static_assert(sizeof(Bits) == sizeof(T));
    return mutable_data<Bits>(weight_) + i * weight_.stride(0);
  }

  // Calls body(begin, end) over ranges of rows in parallel.
  template <class Body>
  void for_rows(Body&& body) const {
    if (rows_ > 0 && cols_ > 0) at::parallel_for(0, rows_, row_grain(cols_), body);
  }

  // Runs visit(i) -> bool for every row in parallel; if one returns false, raises for the first such row. A visit that
  // writes nothing to the weight keeps the promise that bad input changes nothing.
  template <class Visit>
  void for_rows_or_report(Visit&& visit) const {
    std::atomic<int64_t> first_bad{std::numeric_limits<int64_t>::max()};
    for_rows([&](int64_t begin, int64_t end) {
      auto one = visit();
      for (int64_t i = begin; i < end; ++i) {
        if (one(i)) continue;
        int64_t seen = first_bad.load();
        while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
        }
        return;
      }
    });
    if (first_bad.load() < rows_) report(first_bad.load());
  }

 private:
  [[noreturn]] void report(int64_t i) const {
    const ScoredRow<T> bad = row(i);
    int64_t j = 0;
    while (is_finite(score_at<F>(bad, j))) ++j;
    report_not_finite(op_, weight_, column_, moment_, i, j);
  }

  std::string_view op_;
  const at::Tensor& weight_;
  const OptionalTensor& column_;
  const OptionalTensor& moment_;
  int64_t rows_, cols_;
  ScoreSums sums_;
};

// Calls action(matrix) with the ScoredMatrix of the formula and dtype.
template <class Action>
void with_scored(std::string_view op, Formula formula, const at::Tensor& weight, const OptionalTensor& column,
                 const OptionalTensor& moment, Action&& action) {
  with_formula(formula, [&](auto f) {
    with_scalar(weight.scalar_type(),
                [&](auto scalar) { action(ScoredMatrix<decltype(f), decltype(scalar)>(op, weight, column, moment)); });
  });
}

}  // namespace ace
