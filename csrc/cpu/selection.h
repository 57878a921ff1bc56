// Selections within a matrix, as templates over their outcome: `out(i)` is the outcome (cpu/outcome.h) of row i.
//
// The first pass only reads, and checks that all scores are finite before anything is written. Then rows and groups
// take one pass; a cut over the matrix takes a few more to find. Scores are not stored: the extra memory is one row of
// keys for each thread.
#pragma once

#include "cpu/matrix_cut.h"
#include "cpu/nm_rows.h"
#include "cpu/row_selector.h"

namespace ace::cpu {

// Keeps the best keep_k of each row. threshold[i], unless null: the smallest kept score.
template <class Matrix, class Out>
void select_rows(const Matrix& matrix, const Out& out, int64_t keep_k, float* threshold) {
  if (threshold) std::fill(threshold, threshold + matrix.rows(), cut_threshold(kKeepNone));
  matrix.require_finite();
  matrix.for_rows([&](int64_t begin, int64_t end) {
    RowSelector<typename Matrix::Formula, typename Matrix::Scalar> selector(matrix.cols(), keep_k);
    for (int64_t i = begin; i < end; ++i) {
      const float smallest = selector.select(matrix.row(i), out(i));
      if (threshold) threshold[i] = smallest;
    }
  });
}

// Applies cut(i) to row i.
template <class Matrix, class Out, class CutOfRow>
void apply_cuts(const Matrix& matrix, const Out& out, CutOfRow&& cut) {
  using F = typename Matrix::Formula;
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys;
    for (int64_t i = begin; i < end; ++i) {
      if (const Cut at = cut(i); at.ties == 0 && at.key != kKeepNone.key) {
        keep_from_key<F>(matrix.row(i), out(i), at.key + 1u);
      } else {
        keys.resize(static_cast<size_t>(matrix.cols()));
        row_keys<F>(matrix.row(i), keys.data());
        apply_cut(out(i), keys.data(), matrix.cols(), at);
      }
    }
  });
}

// Applies a cut over the whole matrix: its ties are given to the rows from the top. Scores must be finite.
template <class Matrix, class Out>
void apply_matrix_cut(const Matrix& matrix, const Out& out, Cut cut) {
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
  apply_cuts(matrix, out, [&](int64_t i) { return Cut{cut.key, equal[static_cast<size_t>(i)]}; });
}

// Keeps the best keep_k of the matrix; returns the smallest kept score.
template <class Matrix, class Out>
float select_matrix(const Matrix& matrix, const Out& out, int64_t keep_k) {
  matrix.require_finite();
  const Cut cut = find_matrix_cut(matrix, keep_k);
  apply_matrix_cut(matrix, out, cut);
  return cut_threshold(cut);
}

// Group sizes that keep_best_of_row supports.
template <int kGroup, class Matrix, class Out>
void select_small_groups(const Matrix& matrix, const Out& out, int keep_n) {
  using F = typename Matrix::Formula;
  constexpr bool one_pass = kOnePass<F, decltype(out(0))>;
  const std::vector<float> column = by_place(one_pass ? matrix.row(0).column : nullptr, matrix.cols(), kGroup);
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(one_pass ? 0 : matrix.cols()));
    for (int64_t i = begin; i < end; ++i) {
      auto row = matrix.row(i);
      if constexpr (one_pass) {
        row.column = column.data();
        keep_best_of_row<kGroup, F>(row, out(i), keep_n);
      } else {
        keep_best_of_scored_row<kGroup, F>(row, out(i), keep_n, scores.data());
      }
    }
  });
}

template <class Matrix, class Out>
void select_any_groups(const Matrix& matrix, const Out& out, int keep_n, int group_m) {
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(static_cast<size_t>(matrix.cols()));
    for (int64_t i = begin; i < end; ++i) {
      row_keys<typename Matrix::Formula>(matrix.row(i), keys.data());
      keep_best_of_groups(out(i), keys.data(), matrix.cols(), group_m, keep_n);
    }
  });
}

// Keeps the best keep_n of each group of group_m columns.
template <class Matrix, class Out>
void select_groups(const Matrix& matrix, const Out& out, int keep_n, int group_m) {
  if (matrix.rows() == 0 || matrix.cols() == 0) return;
  matrix.require_finite();
  switch (group_m) {
    case 2: return select_small_groups<2>(matrix, out, keep_n);
    case 4: return select_small_groups<4>(matrix, out, keep_n);
    case 8: return select_small_groups<8>(matrix, out, keep_n);
    default: return select_any_groups(matrix, out, keep_n, group_m);
  }
}

// The outcome that prunes the rows of the matrix.
template <class Matrix>
auto prune_rows_of(const Matrix& matrix) {
  return [&matrix](int64_t i) { return PruneRow<typename Matrix::Scalar>{matrix.mutable_row(i)}; };
}

}  // namespace ace::cpu
