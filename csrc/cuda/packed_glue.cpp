// packed_linear and unpack_bitmap on CUDA. For a few tokens the kernel multiplies from the bitmap. For more, rows are
// unpacked into a scratch matrix, and torch multiplies.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "cuda/glue.h"
#include "cuda/packed.h"
#include "ops/packed.h"

namespace ace::cuda {
namespace {

PackedArguments packed_of(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& row_start,
                          int64_t cols) {
  return {bitmap.const_data_ptr<uint8_t>(),
          values.const_data_ptr(),
          row_start ? row_start->const_data_ptr<int64_t>() : nullptr,
          bitmap.size(0),
          cols,
          bitmap.size(1) / 8,
          values.numel(),
          values.size(-1),
          dtype_of(values)};
}

at::Tensor unpack_bitmap(const at::Tensor& bitmap, const at::Tensor& values, const OptionalTensor& row_start,
                         int64_t cols) {
  check_packed("unpack_bitmap", bitmap, values, row_start, cols);
  const c10::cuda::CUDAGuard guard(bitmap.device());
  at::Tensor out = at::empty({bitmap.size(0), cols}, values.options());
  C10_CUDA_CHECK(launch_unpack_bitmap(packed_of(bitmap, values, row_start, cols), out.mutable_data_ptr(), stream()));
  return out;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& bitmap, const at::Tensor& values,
                         const OptionalTensor& row_start, const OptionalTensor& bias) {
  check_packed_linear(x, bitmap, values, row_start, bias);
  const c10::cuda::CUDAGuard guard(x.device());
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);  // at::linear keeps the dtypes
  if (x.size(0) > kPackedTokens) return at::linear(x, unpack_bitmap(bitmap, values, row_start, x.size(1)), bias);
  at::Tensor out = at::empty({x.size(0), bitmap.size(0)}, x.options());
  const Activations tokens{x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), dtype_of(x)};
  C10_CUDA_CHECK(launch_packed_linear(packed_of(bitmap, values, row_start, x.size(1)), tokens,
                                      bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr(), stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("unpack_bitmap", &unpack_bitmap);
}

}  // namespace ace::cuda
