// restore_mean_ on CUDA.
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/restore.h"
#include "ops/restore.h"

namespace ace::cuda {
namespace {

void restore_mean(at::Tensor weight, const at::Tensor& mask, const at::Tensor& mean, const at::Tensor& direction) {
  check_restore_mean(weight, mask, mean, direction);
  const c10::cuda::CUDAGuard guard(weight.device());
  const RestoreArguments arguments{weight.mutable_data_ptr<float>(),
                                   mask.const_data_ptr<bool>(),
                                   mean.const_data_ptr<float>(),
                                   direction.const_data_ptr<float>(),
                                   weight.size(0),
                                   weight.size(1),
                                   weight.stride(0),
                                   mask.stride(0)};
  C10_CUDA_CHECK(launch_restore_mean(arguments, op_code("restore_mean_"), stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("restore_mean_", &restore_mean); }

}  // namespace ace::cuda
