// A weight with the inputs of its scores, visited row by row. Scores are not stored but recomputed wherever they are
// read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/scored_row.h"
#include "ops/score.h"

namespace ace::cpu {

// Sums of |W| for the ria score, float64 rounded once.
struct ScoreSums {
  std::vector<float> row;     // [rows]
  std::vector<float> column;  // [cols]
};

ScoreSums score_sums(const at::Tensor& weight);

// A checked weight with everything that its formula reads.
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

  // The row to write.
  Bits<T>* mutable_row(int64_t i) const { return mutable_data<Bits<T>>(weight_) + i * weight_.stride(0); }

  // Calls body(begin, end) over ranges of rows in parallel.
  template <class Body>
  void for_rows(Body&& body) const {
    if (rows_ > 0 && cols_ > 0) at::parallel_for(0, rows_, row_grain(cols_), body);
  }

  // Raises unless all scores are finite. The pruning ops call this before they write anything.
  void require_finite() const {
    if (bounds_say_finite()) return;
    for_rows_or_report([&] { return [&](int64_t i) { return row_is_finite<F>(row(i)); }; });
  }

  // Runs visit(i) -> bool for every row in parallel; if one returns false, raises for the first such row. The visit
  // must not write the weight, so that bad input changes nothing.
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
  // True if the largest weight has a finite score with the largest column factor: that product bounds all scores, and
  // shows NaN or infinity in either. Reads the weight once, at a fraction of the cost of its scores.
  bool bounds_say_finite() const {
    if constexpr (F::kMoment || F::kSums) return false;
    std::atomic<bool> finite{true};
    const ScoreTerms terms{F::kColumn ? largest_size(data<float>(*column_), cols_) : 0.0f, 0.0f, 0.0f, 0.0f};
    for_rows([&](int64_t begin, int64_t end) {
      float largest = 0.0f;
      for (int64_t i = begin; i < end && is_finite(largest); ++i) {
        largest = std::max(largest_size(row(i).weight, cols_), largest);
      }
      if (!is_finite(F::value(largest, terms))) finite = false;
    });
    return finite;
  }

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

}  // namespace ace::cpu
