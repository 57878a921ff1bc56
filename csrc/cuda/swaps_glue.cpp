// refine_swaps_ on CUDA.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/swaps.h"
#include "ops/swaps.h"

namespace ace::cuda {
namespace {

at::Tensor refine_swaps(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps) {
  check_refine_swaps(mask, weight, gram, keep_n, group_m, max_swaps);
  const c10::cuda::CUDAGuard guard(weight.device());
  at::Tensor swaps = at::zeros({weight.size(0)}, weight.options().dtype(at::kLong));
  const SwapArguments arguments{weight.const_data_ptr(),
                                mask.mutable_data_ptr<bool>(),
                                gram.const_data_ptr<float>(),
                                weight.size(0),
                                weight.size(1),
                                weight.stride(0),
                                mask.stride(0),
                                max_swaps,
                                static_cast<int>(keep_n),
                                static_cast<int>(group_m),
                                dtype_of(weight)};
  size_t bytes = 0;
  C10_CUDA_CHECK(refine_swaps_bytes(arguments, &bytes));
  const at::Tensor work = workspace(bytes, weight);
  C10_CUDA_CHECK(launch_refine_swaps(arguments, swaps.mutable_data_ptr<int64_t>(), work.mutable_data_ptr(),
                                     op_code("refine_swaps_"), stream()));
  return swaps;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("refine_swaps_", &refine_swaps); }

}  // namespace ace::cuda
