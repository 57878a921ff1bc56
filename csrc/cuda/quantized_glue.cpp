// quantized_linear and unpack_quantized on CUDA. For a few tokens the kernel multiplies from the codes. For more, rows
// are unpacked into a scratch matrix, whose weights are rounded to the dtype of scales, and torch multiplies.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/quantized.h"
#include "ops/quantized.h"

namespace ace::cuda {
namespace {

QuantizedArguments quantized_of(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales,
                                int64_t bits, int64_t group, const OptionalTensor& row_start, int64_t cols) {
  return {bitmap.const_data_ptr<uint8_t>(),
          codes.const_data_ptr<uint8_t>(),
          row_start ? row_start->const_data_ptr<int64_t>() : nullptr,
          scales.const_data_ptr(),
          bitmap.size(0),
          cols,
          bitmap.size(1) / 8,
          codes.numel(),
          codes.size(-1),
          group,
          static_cast<int>(bits),
          dtype_of(scales)};
}

at::Tensor unpack_quantized(const at::Tensor& bitmap, const at::Tensor& codes, const at::Tensor& scales, int64_t bits,
                            int64_t group, const OptionalTensor& row_start, int64_t cols) {
  check_quantized("unpack_quantized", bitmap, codes, scales, bits, group, row_start, cols);
  const c10::cuda::CUDAGuard guard(bitmap.device());
  at::Tensor out = at::empty({bitmap.size(0), cols}, scales.options());
  C10_CUDA_CHECK(launch_unpack_quantized(quantized_of(bitmap, codes, scales, bits, group, row_start, cols),
                                         out.mutable_data_ptr(), stream()));
  return out;
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& codes,
                            const at::Tensor& scales, int64_t bits, int64_t group, const OptionalTensor& row_start,
                            const OptionalTensor& bias) {
  check_quantized_linear(x, bitmap, codes, scales, bits, group, row_start, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);  // at::linear keeps the dtypes
  if (x.size(0) > kQuantizedTokens) {
    return at::linear(x, unpack_quantized(bitmap, codes, scales, bits, group, row_start, x.size(1)), bias);
  }
  at::Tensor out = at::empty({x.size(0), bitmap.size(0)}, x.options());
  const Activations tokens{x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), dtype_of(x)};
  C10_CUDA_CHECK(launch_quantized_linear(quantized_of(bitmap, codes, scales, bits, group, row_start, x.size(1)), tokens,
                                         bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(), stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("quantized_linear", &quantized_linear);
  m.impl("unpack_quantized", &unpack_quantized);
}

}  // namespace ace::cuda
