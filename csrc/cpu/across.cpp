// The parts of a selection over several matrices, on the CPU.
#include "ops/across.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/selection.h"

namespace ace::cpu {
namespace {

at::Tensor score_histogram(const at::Tensor& weight, std::string_view formula, int64_t prefix, int64_t level,
                           const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("score_histogram", weight, formula, column, moment);
  check_score_histogram(prefix, level);
  const int pass = static_cast<int>(level);
  at::Tensor out = at::zeros({radix_bins(pass)}, weight.options().dtype(at::kLong));
  with_scored("score_histogram", checked, weight, column, moment, [&](const auto& matrix) {
    const std::vector<int64_t> counts = matrix_histogram(matrix, static_cast<uint32_t>(prefix), pass);
    std::copy(counts.begin(), counts.end(), mutable_data<int64_t>(out));
  });
  return out;
}

void prune_at(at::Tensor weight, std::string_view formula, int64_t key, int64_t ties, const OptionalTensor& column,
              const OptionalTensor& moment) {
  const Formula checked = check_scored("prune_at_", weight, formula, column, moment);
  check_prune_at(key, ties);
  with_scored("prune_at_", checked, weight, column, moment, [&](const auto& matrix) {
    matrix.require_finite();
    apply_matrix_cut(matrix, prune_rows_of(matrix), {static_cast<uint32_t>(key), ties});
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("score_histogram", &score_histogram);
  m.impl("prune_at_", &prune_at);
}

}  // namespace ace::cpu
