// The parts of a selection over several matrices, on CUDA.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/across.h"
#include "cuda/glue.h"
#include "cuda/prune.h"
#include "ops/across.h"
#include "ops/score.h"

namespace ace::cuda {
namespace {

at::Tensor score_histogram(const at::Tensor& weight, std::string_view formula, int64_t prefix, int64_t level,
                           const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("score_histogram", weight, formula, column, moment);
  check_score_histogram(prefix, level);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor counts = at::zeros({radix_bins(static_cast<int>(level))}, weight.options().dtype(at::kLong));
  const ScoredTensors scored(weight, checked, column, moment, false);
  const at::Tensor work = workspace(prune_matrix_bytes(scored.arguments), weight);
  C10_CUDA_CHECK(launch_score_histogram(scored.arguments, static_cast<uint32_t>(prefix), static_cast<int>(level),
                                        counts.mutable_data_ptr<int64_t>(), work.mutable_data_ptr(), scored.sums(),
                                        op_code("score_histogram"), stream()));
  return counts;
}

void prune_at(at::Tensor weight, std::string_view formula, int64_t key, int64_t ties, const OptionalTensor& column,
              const OptionalTensor& moment) {
  const Formula checked = check_scored("prune_at_", weight, formula, column, moment);
  check_prune_at(key, ties);
  const c10::cuda::CUDAGuard guard(weight.device());
  const ScoredTensors scored(weight, checked, column, moment, true);
  const at::Tensor work = workspace(prune_matrix_bytes(scored.arguments), weight);
  C10_CUDA_CHECK(launch_prune_at(scored.arguments, {static_cast<uint32_t>(key), ties}, work.mutable_data_ptr(),
                                 scored.sums(), op_code("prune_at_"), stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("score_histogram", &score_histogram);
  m.impl("prune_at_", &prune_at);
}

}  // namespace ace::cuda
