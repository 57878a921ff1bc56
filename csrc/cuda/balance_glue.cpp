// balance_mean_ on CUDA.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/balance.h"
#include "cuda/glue.h"
#include "ops/balance.h"

namespace ace::cuda {
namespace {

at::Tensor balance_mean(at::Tensor mask, const at::Tensor& weight, const at::Tensor& variance, const at::Tensor& mean,
                        int64_t group_m, int64_t rounds) {
  check_balance_mean(mask, weight, variance, mean, group_m, rounds);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor swaps = at::zeros({weight.size(0)}, weight.options().dtype(at::kLong));
  const BalanceArguments arguments{weight.const_data_ptr(),
                                   mask.mutable_data_ptr<bool>(),
                                   variance.const_data_ptr<float>(),
                                   mean.const_data_ptr<float>(),
                                   weight.size(0),
                                   weight.size(1),
                                   weight.stride(0),
                                   mask.stride(0),
                                   rounds,
                                   static_cast<int>(group_m),
                                   dtype_of(weight)};
  C10_CUDA_CHECK(launch_balance_mean(arguments, swaps.mutable_data_ptr<int64_t>(), op_code("balance_mean_"), stream()));
  return swaps;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("balance_mean_", &balance_mean); }

}  // namespace ace::cuda
