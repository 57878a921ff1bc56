// quantize_block_ on CUDA.
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/quantize_block.h"
#include "ops/quantize_block.h"

namespace ace::cuda {
namespace {

void quantize_block(at::Tensor weight, at::Tensor error, const at::Tensor& mask, const at::Tensor& scale,
                    const at::Tensor& factor, int64_t bits, const OptionalTensor& current) {
  check_quantize_block(weight, error, mask, scale, factor, bits, current);
  const c10::cuda::CUDAGuard guard(weight.device());
  const QuantizeArguments arguments{weight.mutable_data_ptr<float>(),
                                    error.mutable_data_ptr<float>(),
                                    mask.const_data_ptr<bool>(),
                                    scale.const_data_ptr(),
                                    factor.const_data_ptr<float>(),
                                    optional_data(current),
                                    weight.size(0),
                                    weight.size(1),
                                    weight.stride(0),
                                    error.stride(0),
                                    mask.stride(0),
                                    factor.stride(0),
                                    current ? current->stride(0) : 0,
                                    static_cast<int>(bits),
                                    dtype_of(scale)};
  const at::Tensor work = workspace(quantize_block_bytes(), weight);
  C10_CUDA_CHECK(launch_quantize_block(arguments, work.mutable_data_ptr(), op_code("quantize_block_"), stream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) { m.impl("quantize_block_", &quantize_block); }

}  // namespace ace::cuda
