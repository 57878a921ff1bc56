// Statistics of activations on CUDA.
//
// update_cosine_moment_: products on tensor cores. r_t a_ti^2 and r_t x_tj^2 are each rounded to bfloat16 (relative
// error at most 2^-8), multiplied exactly and added in float32. All terms are positive, so each call's sum is within
// 2^-7 + 2^-15 of its value, plus the float32 additions. Float32 input is not more precise.
#include <ATen/ops/addmm.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/glue.h"
#include "cuda/moments.h"
#include "ops/moments.h"

namespace ace::cuda {
namespace {

Activations activations(const at::Tensor& x) {
  return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), dtype_of(x)};
}

void update_moments(at::Tensor weight_sum, at::Tensor mean, at::Tensor m2, const at::Tensor& x,
                    const OptionalTensor& token_weight) {
  check_update_moments(weight_sum, mean, m2, x, token_weight);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.size(0) == 0) return;
  size_t bytes = 0;
  C10_CUDA_CHECK(update_moments_bytes(activations(x), &bytes));
  const at::Tensor work = workspace(bytes, x);
  C10_CUDA_CHECK(launch_update_moments(activations(x), optional_data(token_weight), mean.scalar_type() == at::kDouble,
                                       weight_sum.mutable_data_ptr(), mean.mutable_data_ptr(), m2.mutable_data_ptr(),
                                       work.mutable_data_ptr(), op_code("update_moments_"), stream()));
}

at::Tensor inverse_square_norm(const at::Tensor& a) {
  check_inverse_square_norm(a);
  const c10::cuda::CUDAGuard guard(a.device());
  at::Tensor r = at::empty({a.size(0)}, a.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_inverse_square_norm(activations(a), r.mutable_data_ptr<float>(), op_code("inverse_square_norm"),
                                            stream()));
  return r;
}

void update_cosine_moment(at::Tensor moment, const at::Tensor& x, const at::Tensor& a) {
  check_update_cosine_moment(moment, x, a);
  const c10::cuda::CUDAGuard guard(x.device());
  constexpr int64_t kTokens = 4096;  // bounds the memory of the squares; enough for an efficient product
  const auto squares = [](const at::Tensor& v, const at::Tensor& r) {
    at::Tensor out = at::empty(v.sizes(), v.options().dtype(at::kBFloat16));
    C10_CUDA_CHECK(launch_scaled_squares(activations(v), r.const_data_ptr<float>(), out.mutable_data_ptr(), stream()));
    return out;
  };
  if (moment.numel() == 0) return;
  for (int64_t t = 0; t < x.size(0); t += kTokens) {
    const int64_t count = std::min(kTokens, x.size(0) - t);
    const at::Tensor a_part = a.narrow(0, t, count);
    at::Tensor r = at::empty({count}, a.options().dtype(at::kFloat));
    C10_CUDA_CHECK(launch_inverse_square_norm(activations(a_part), r.mutable_data_ptr<float>(),
                                              op_code("update_cosine_moment_"), stream()));
    at::addmm_out(moment, moment, squares(a_part, r).t(), squares(x.narrow(0, t, count), r), at::kFloat);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CUDA, m) {
  m.impl("update_moments_", &update_moments);
  m.impl("inverse_square_norm", &inverse_square_norm);
  m.impl("update_cosine_moment_", &update_cosine_moment);
}

}  // namespace ace::cuda
