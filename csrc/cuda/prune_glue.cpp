// The ops that prune within a matrix, on CUDA.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <limits>

#include "check.h"
#include "cuda/glue.h"
#include "cuda/prune.h"
#include "ops/prune.h"
#include "ops/score.h"

namespace ace::cuda {
namespace {

at::Tensor prune_topk(at::Tensor weight, std::string_view formula, int64_t keep_k, const OptionalTensor& column,
                      const OptionalTensor& moment, std::string_view group_name) {
  const Formula checked = check_scored("prune_topk_", weight, formula, column, moment);
  const Group group = check_topk("prune_topk_", weight, keep_k, group_name);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::TensorOptions options = weight.options().dtype(at::kFloat);
  const int64_t groups = group == Group::row ? weight.size(0) : 1;
  if (weight.numel() == 0) return at::full({groups}, std::numeric_limits<float>::infinity(), options);
  at::Tensor threshold = at::empty({groups}, options);
  float* smallest = threshold.mutable_data_ptr<float>();
  const ScoredTensors scored(weight, checked, column, moment, true);
  const int code = op_code("prune_topk_");
  if (group == Group::row) {
    C10_CUDA_CHECK(launch_prune_rows(scored.arguments, keep_k, smallest, scored.sums(), code, stream()));
  } else {
    const at::Tensor work = workspace(prune_matrix_bytes(scored.arguments), weight);
    C10_CUDA_CHECK(launch_prune_matrix(scored.arguments, keep_k, smallest, work.mutable_data_ptr(), scored.sums(), code,
                                       stream()));
  }
  return threshold;
}

void prune_nm(at::Tensor weight, std::string_view formula, int64_t keep_n, int64_t group_m,
              const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("prune_nm_", weight, formula, column, moment);
  check_nm("prune_nm_", weight, keep_n, group_m);
  const c10::cuda::CUDAGuard guard(weight.device());
  const ScoredTensors scored(weight, checked, column, moment, true);
  C10_CUDA_CHECK(launch_prune_nm(scored.arguments, static_cast<int>(keep_n), static_cast<int>(group_m), scored.sums(),
                                 op_code("prune_nm_"), stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("prune_topk_", &prune_topk);
  m.impl("prune_nm_", &prune_nm);
}

}  // namespace ace::cuda
