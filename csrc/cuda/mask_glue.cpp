// The masks of the same selections, on CUDA.
#include <torch/library.h>

#include "check.h"
#include "cuda/glue.h"
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "ops/mask.h"
#include "ops/prune.h"
#include "ops/score.h"

namespace ace::cuda {
namespace {

at::Tensor empty_mask(const at::Tensor& weight) { return at::empty(weight.sizes(), weight.options().dtype(at::kBool)); }

at::Tensor topk_mask(const at::Tensor& weight, std::string_view formula, int64_t keep_k, const OptionalTensor& column,
                     const OptionalTensor& moment, std::string_view group_name) {
  const Formula checked = check_scored("topk_mask", weight, formula, column, moment);
  const Group group = check_topk("topk_mask", weight, keep_k, group_name);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor mask = empty_mask(weight);
  if (weight.numel() == 0) return mask;
  bool* kept = mask.mutable_data_ptr<bool>();
  const ScoredTensors scored(weight, checked, column, moment, false);
  const int code = op_code("topk_mask");
  if (group == Group::row) {
    C10_CUDA_CHECK(launch_mask_rows(scored.arguments, keep_k, kept, scored.sums(), code, stream()));
  } else {
    const at::Tensor work = workspace(prune_matrix_bytes(scored.arguments), weight);
    C10_CUDA_CHECK(
        launch_mask_matrix(scored.arguments, keep_k, kept, work.mutable_data_ptr(), scored.sums(), code, stream()));
  }
  return mask;
}

at::Tensor nm_mask(const at::Tensor& weight, std::string_view formula, int64_t keep_n, int64_t group_m,
                   const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("nm_mask", weight, formula, column, moment);
  check_nm("nm_mask", weight, keep_n, group_m);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor mask = empty_mask(weight);
  const ScoredTensors scored(weight, checked, column, moment, false);
  C10_CUDA_CHECK(launch_mask_nm(scored.arguments, static_cast<int>(keep_n), static_cast<int>(group_m),
                                mask.mutable_data_ptr<bool>(), scored.sums(), op_code("nm_mask"), stream()));
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("topk_mask", &topk_mask);
  m.impl("nm_mask", &nm_mask);
}

}  // namespace ace::cuda
