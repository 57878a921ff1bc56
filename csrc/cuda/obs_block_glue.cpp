// obs_block_ on CUDA.
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/obs_block.h"
#include "ops/obs_block.h"

namespace ace::cuda {
namespace {

void obs_block(at::Tensor weight, at::Tensor error, at::Tensor mask, const at::Tensor& factor, int64_t keep_n,
               int64_t group_m) {
  check_obs_block(weight, error, mask, factor, keep_n, group_m);
  const c10::cuda::CUDAGuard guard(weight.device());
  const ObsArguments arguments{weight.mutable_data_ptr<float>(),
                               error.mutable_data_ptr<float>(),
                               mask.mutable_data_ptr<bool>(),
                               factor.const_data_ptr<float>(),
                               weight.size(0),
                               weight.size(1),
                               weight.stride(0),
                               error.stride(0),
                               mask.stride(0),
                               factor.stride(0),
                               static_cast<int>(keep_n),
                               static_cast<int>(group_m)};
  const at::Tensor work = workspace(obs_block_bytes(), weight);
  C10_CUDA_CHECK(launch_obs_block(arguments, work.mutable_data_ptr(), op_code("obs_block_"), stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("obs_block_", &obs_block); }

}  // namespace ace::cuda
