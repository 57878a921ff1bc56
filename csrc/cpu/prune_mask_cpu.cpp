// The pruning ops on the CPU. Two passes over the weight: the first finds the cuts and meets whatever is not finite,
// the second recomputes the keys and writes zeros. So nothing is written before everything was checked, and no score or
// mask is stored: the extra memory is one row of keys a thread.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/histogram.h"
#include "cpu/row_select.h"

namespace ace {
namespace {

// A weight as an integer of its size: what is kept keeps its bits, and +0.0 is 0 in every type.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

template <class B>
ACE_MULTIVERSION void zero_below(B* weight, const uint32_t* keys, int64_t cols, uint32_t lowest_kept) {
  for (int64_t j = 0; j < cols; ++j) weight[j] = keys[j] >= lowest_kept ? weight[j] : B{0};
}

ACE_MULTIVERSION int64_t count_equal(const uint32_t* keys, int64_t cols, uint32_t key) {
  int64_t count = 0;
  for (int64_t j = 0; j < cols; ++j) count += keys[j] == key;
  return count;
}

// Where the first `ties` keys equal to `key` end.
int64_t end_of_ties(const uint32_t* keys, int64_t cols, uint32_t key, int64_t ties) {
  int64_t j = 0;
  for (; j < cols && ties > 0; ++j) ties -= keys[j] == key;
  return j;
}

template <class B>
void apply_cut(B* weight, const uint32_t* keys, int64_t cols, Cut cut) {
  const int64_t split = end_of_ties(keys, cols, cut.key, cut.ties);
  zero_below(weight, keys, split, cut.key);
  if (cut.key == kKeepNone.key) {
    std::fill(weight + split, weight + cols, B{0});
  } else {
    zero_below(weight + split, keys + split, cols - split, cut.key + 1u);
  }
}

// Second pass: row i keeps what cut(i) says.
template <class Matrix, class CutOfRow>
void apply_cuts(const Matrix& matrix, CutOfRow&& cut) {
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(static_cast<size_t>(matrix.cols()));
    for (int64_t i = begin; i < end; ++i) {
      row_keys<typename Matrix::Formula>(matrix.row(i), keys.data());
      apply_cut(matrix.template mutable_row<Bits<typename Matrix::Scalar>>(i), keys.data(), matrix.cols(), cut(i));
    }
  });
}

template <class Matrix>
void prune_rows(const Matrix& matrix, int64_t keep_k, float* threshold) {
  std::vector<Cut> cuts(static_cast<size_t>(matrix.rows()), kKeepNone);
  matrix.for_rows_or_report([&] {
    return [&, keys = std::vector<uint32_t>(static_cast<size_t>(matrix.cols())),
            hint = order_key(1.0f)](int64_t i) mutable {
      if (!row_keys<typename Matrix::Formula>(matrix.row(i), keys.data())) return false;
      cuts[static_cast<size_t>(i)] = search_kth(keys.data(), matrix.cols(), keep_k, &hint);
      return true;
    };
  });
  apply_cuts(matrix, [&](int64_t i) { return cuts[static_cast<size_t>(i)]; });
  for (size_t i = 0; i < cuts.size(); ++i) threshold[i] = cut_threshold(cuts[i]);
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
  Cut cut{0u, keep_k};
  for (int pass = 0; pass < kRadixPasses; ++pass) {
    const std::vector<int64_t> counts = matrix_histogram(matrix, cut.key, pass);
    if (keep_k == 0) break;  // but for the check that all is finite
    const RadixBin found = find_bin(counts.data(), radix_bins(pass), cut.ties);
    cut.key |= found.bin << radix_digit(pass).shift;
    cut.ties -= found.above;
  }
  if (keep_k == 0) cut = kKeepNone;
  prune_matrix_at(matrix, cut);
  *threshold = cut_threshold(cut);
}

template <class Matrix>
void prune_groups(const Matrix& matrix, int group_m, int keep_n) {
  using F = typename Matrix::Formula;
  matrix.for_rows_or_report([&] { return [&](int64_t i) { return row_is_finite<F>(matrix.row(i)); }; });
  matrix.for_rows([&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(static_cast<size_t>(matrix.cols()));
    for (int64_t i = begin; i < end; ++i) {
      row_keys<F>(matrix.row(i), keys.data());
      keep_best_of_groups(matrix.template mutable_row<Bits<typename Matrix::Scalar>>(i), keys.data(), matrix.cols(),
                          group_m, keep_n);
    }
  });
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
    using F = typename std::decay_t<decltype(matrix)>::Formula;
    matrix.for_rows_or_report([&] { return [&](int64_t i) { return row_is_finite<F>(matrix.row(i)); }; });
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
