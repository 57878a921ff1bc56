// The pruning ops on the CPU. The first pass only reads: it meets whatever is not finite, so that nothing is written
// before everything was checked. Then rows and groups are pruned in one pass; a cut over the matrix takes some more to
// be found. No score or mask is stored: the extra memory is one row of keys a thread.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/matrix_cut.h"
#include "cpu/nm_rows.h"
#include "cpu/row_pruner.h"

namespace ace {
namespace {

// Row i keeps what cut(i) says.
template <class Matrix, class CutOfRow>
void apply_cuts(const Matrix& matrix, CutOfRow&& cut) {
  using F = typename Matrix::Formula;
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys;
    for (int64_t i = begin; i < end; ++i) {
      if (const Cut at = cut(i); at.ties == 0 && at.key != kKeepNone.key) {
        zero_below_key<F>(matrix.row(i), matrix.mutable_row(i), at.key + 1u);
      } else {
        keys.resize(static_cast<size_t>(matrix.cols()));
        row_keys<F>(matrix.row(i), keys.data());
        apply_cut(matrix.mutable_row(i), keys.data(), matrix.cols(), at);
      }
    }
  });
}

template <class Matrix>
void prune_rows(const Matrix& matrix, int64_t keep_k, float* threshold) {
  std::fill(threshold, threshold + matrix.rows(), cut_threshold(kKeepNone));
  matrix.require_finite();
  matrix.for_rows([&](int64_t begin, int64_t end) {
    RowPruner<typename Matrix::Formula, typename Matrix::Scalar> pruner(matrix.cols(), keep_k);
    for (int64_t i = begin; i < end; ++i) threshold[i] = pruner.prune(matrix.row(i), matrix.mutable_row(i));
  });
}

// A cut over the whole matrix: the ties it keeps are dealt out to the rows from the top.
template <class Matrix>
void prune_matrix_at(const Matrix& matrix, Cut cut) {
  std::vector<int64_t> equal(static_cast<size_t>(matrix.rows()));
  if (cut.ties > 0) {
    matrix.for_rows([&](int64_t begin, int64_t end) {
      std::vector<uint32_t> keys(static_cast<size_t>(matrix.cols()));
      for (int64_t i = begin; i < end; ++i) {
        row_keys<typename Matrix::Formula>(matrix.row(i), keys.data());
        equal[static_cast<size_t>(i)] = count_equal(keys.data(), matrix.cols(), cut.key);
      }
    });
  }
  int64_t left = cut.ties;
  for (int64_t& count : equal) {
    count = std::min(count, left);
    left -= count;
  }
  apply_cuts(matrix, [&](int64_t i) { return Cut{cut.key, equal[static_cast<size_t>(i)]}; });
}

template <class Matrix>
void prune_matrix(const Matrix& matrix, int64_t keep_k, float* threshold) {
  matrix.require_finite();
  const Cut cut = find_matrix_cut(matrix, keep_k);
  prune_matrix_at(matrix, cut);
  *threshold = cut_threshold(cut);
}

// Groups of a size that keep_best_of_row is made for.
template <int kGroup, class Matrix>
void prune_small_groups(const Matrix& matrix, int keep_n) {
  using F = typename Matrix::Formula;
  const auto any_row = matrix.row(0);
  const std::vector<float> column = by_place(any_row.column, matrix.cols(), kGroup);
  const std::vector<float> column_sum = by_place(any_row.column_sum, matrix.cols(), kGroup);
  matrix.for_rows([&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto row = matrix.row(i);
      row.column = column.data();
      row.column_sum = column_sum.data();
      keep_best_of_row<kGroup, F>(row, matrix.mutable_row(i), keep_n);
    }
  });
}

template <class Matrix>
void prune_any_groups(const Matrix& matrix, int group_m, int keep_n) {
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(static_cast<size_t>(matrix.cols()));
    for (int64_t i = begin; i < end; ++i) {
      row_keys<typename Matrix::Formula>(matrix.row(i), keys.data());
      keep_best_of_groups(matrix.mutable_row(i), keys.data(), matrix.cols(), group_m, keep_n);
    }
  });
}

template <class Matrix>
void prune_groups(const Matrix& matrix, int group_m, int keep_n) {
  if (matrix.rows() == 0 || matrix.cols() == 0) return;
  matrix.require_finite();
  switch (group_m) {
    case 2: return prune_small_groups<2>(matrix, keep_n);
    case 4: return prune_small_groups<4>(matrix, keep_n);
    case 8: return prune_small_groups<8>(matrix, keep_n);
    default: return prune_any_groups(matrix, group_m, keep_n);
  }
}

at::Tensor prune_topk(std::string_view op, const at::Tensor& weight, Formula formula, const OptionalTensor& column,
                      const OptionalTensor& moment, int64_t keep_k, std::string_view group_name) {
  const Group group = check_topk(op, weight, keep_k, group_name);
  at::Tensor threshold = at::empty({group == Group::row ? weight.size(0) : 1}, weight.options().dtype(at::kFloat));
  with_scored(op, formula, weight, column, moment, [&](const auto& matrix) {
    if (group == Group::row) {
      prune_rows(matrix, keep_k, mutable_data<float>(threshold));
    } else {
      prune_matrix(matrix, keep_k, mutable_data<float>(threshold));
    }
  });
  return threshold;
}

void prune_nm(std::string_view op, const at::Tensor& weight, Formula formula, const OptionalTensor& column,
              const OptionalTensor& moment, int64_t keep_n, int64_t group_m) {
  check_nm(op, weight, keep_n, group_m);
  with_scored(op, formula, weight, column, moment,
              [&](const auto& matrix) { prune_groups(matrix, static_cast<int>(group_m), static_cast<int>(keep_n)); });
}

// The kernels read float32 moments: widening a user's half scores is exact.
OptionalTensor as_moment(const at::Tensor& score) { return score.to(at::kFloat).contiguous(); }

}  // namespace

at::Tensor prune_topk_cpu(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                          const OptionalTensor& moment, int64_t keep_k, std::string_view group) {
  const Formula formula = check_scored("prune_topk_", weight, metric, column, moment);
  return prune_topk("prune_topk_", weight, formula, column, moment, keep_k, group);
}

void prune_nm_cpu(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                  const OptionalTensor& moment, int64_t keep_n, int64_t group_m) {
  const Formula formula = check_scored("prune_nm_", weight, metric, column, moment);
  prune_nm("prune_nm_", weight, formula, column, moment, keep_n, group_m);
}

at::Tensor prune_by_score_cpu(at::Tensor weight, const at::Tensor& score, int64_t keep_k, std::string_view group) {
  check_given_score("prune_by_score_", weight, score);
  return prune_topk("prune_by_score_", weight, Formula::given, std::nullopt, as_moment(score), keep_k, group);
}

void prune_nm_by_score_cpu(at::Tensor weight, const at::Tensor& score, int64_t keep_n, int64_t group_m) {
  check_given_score("prune_nm_by_score_", weight, score);
  prune_nm("prune_nm_by_score_", weight, Formula::given, std::nullopt, as_moment(score), keep_n, group_m);
}

void prune_at_cpu(at::Tensor weight, std::string_view metric, const OptionalTensor& column,
                  const OptionalTensor& moment, int64_t key, int64_t ties) {
  const Formula formula = check_scored("prune_at_", weight, metric, column, moment);
  check_cut("prune_at_", key, ties);
  with_scored("prune_at_", formula, weight, column, moment, [&](const auto& matrix) {
    matrix.require_finite();
    prune_matrix_at(matrix, {static_cast<uint32_t>(key), ties});
  });
}

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("prune_topk_", &prune_topk_cpu);
  m.impl("prune_nm_", &prune_nm_cpu);
  m.impl("prune_by_score_", &prune_by_score_cpu);
  m.impl("prune_nm_by_score_", &prune_nm_by_score_cpu);
  m.impl("prune_at_", &prune_at_cpu);
}

}  // namespace ace
