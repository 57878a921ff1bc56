// score on the CPU, and the sums by which the ria score divides.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/score_rows.h"

namespace ace::cpu {
namespace {

// Adds |w_j| of one row to the column sums; returns the row's own sum.
template <class T>
ACE_MULTIVERSION double add_row_sums(const T* weight, int64_t cols, double* column_sums) {
  double sum = 0;
  for (int64_t j = 0; j < cols; ++j) {
    const double size = absolute(to_float(weight[j]));
    sum += size;
    column_sums[j] += size;
  }
  return sum;
}

}  // namespace

ScoreSums score_sums(const at::Tensor& weight) {
  const int64_t rows = weight.size(0), cols = weight.size(1);
  std::vector<double> row(static_cast<size_t>(rows)), column(static_cast<size_t>(cols));
  with_scalar(weight.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    for (int64_t i = 0; i < rows; ++i) {
      row[static_cast<size_t>(i)] = add_row_sums(data<T>(weight) + i * weight.stride(0), cols, column.data());
    }
  });
  return {{row.begin(), row.end()}, {column.begin(), column.end()}};
}

namespace {

at::Tensor score(const at::Tensor& weight, std::string_view formula, const OptionalTensor& column,
                 const OptionalTensor& moment) {
  const Formula checked = check_scored("score", weight, formula, column, moment);
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(at::kFloat));
  with_scored("score", checked, weight, column, moment, [&](const auto& matrix) {
    using M = std::decay_t<decltype(matrix)>;
    float* scores = mutable_data<float>(out);
    matrix.for_rows_or_report([&] {
      return [&](int64_t i) {
        row_scores<typename M::Formula>(matrix.row(i), scores + i * matrix.cols());
        return row_is_finite<typename M::Formula>(matrix.row(i));
      };
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) { m.impl("score", &score); }

}  // namespace ace::cpu
