// score on CUDA.
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/score.h"
#include "ops/score.h"

namespace ace::cuda {
namespace {

at::Tensor score(const at::Tensor& weight, std::string_view formula, const OptionalTensor& column,
                 const OptionalTensor& moment) {
  const Formula checked = check_scored("score", weight, formula, column, moment);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(at::kFloat));
  const ScoredTensors scored(weight, checked, column, moment, false);
  C10_CUDA_CHECK(
      launch_score(scored.arguments, out.mutable_data_ptr<float>(), scored.sums(), op_code("score"), stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("score", &score); }

}  // namespace ace::cuda
