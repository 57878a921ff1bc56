// score and score_histogram on the CPU, and the sums that the ria score divides by.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "core/radix_select.h"
#include "cpu/histogram.h"

namespace ace {
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

at::Tensor score_cpu(const at::Tensor& weight, std::string_view metric, const OptionalTensor& column,
                     const OptionalTensor& moment) {
  const Formula formula = check_scored("score", weight, metric, column, moment);
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(at::kFloat));
  with_scored("score", formula, weight, column, moment, [&](const auto& matrix) {
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

at::Tensor score_histogram_cpu(const at::Tensor& weight, std::string_view metric, const OptionalTensor& column,
                               const OptionalTensor& moment, int64_t prefix, int64_t level) {
  const Formula formula = check_scored("score_histogram", weight, metric, column, moment);
  check_level("score_histogram", prefix, level);
  const int pass = static_cast<int>(level);
  at::Tensor out = at::zeros({radix_bins(pass)}, weight.options().dtype(at::kLong));
  with_scored("score_histogram", formula, weight, column, moment, [&](const auto& matrix) {
    const std::vector<int64_t> counts = matrix_histogram(matrix, static_cast<uint32_t>(prefix), pass);
    std::copy(counts.begin(), counts.end(), mutable_data<int64_t>(out));
  });
  return out;
}

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("score", &score_cpu);
  m.impl("score_histogram", &score_histogram_cpu);
}

}  // namespace ace
