// admm_change_ and admm_update_ on the CPU. Both are limited by memory: each reads and writes every matrix once. Rows
// are divided among the threads.
#include "ops/admm.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/choose.h"
#include "cpu/dispatch.h"
#include "cpu/multiversion.h"

namespace ace::cpu {
namespace {

template <class T>
ACE_MULTIVERSION void change_row(T* ACE_RESTRICT change, const float* ACE_RESTRICT weight,
                                 const uint8_t* ACE_RESTRICT mask, const float* ACE_RESTRICT dense,
                                 const float* ACE_RESTRICT norm, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j)
    round_to(choose(all_bits(mask[j]), weight[j], -weight[j]) - dense[j] * norm[j], change + j);
}

template <class T>
ACE_MULTIVERSION void update_row(float* ACE_RESTRICT weight, const T* ACE_RESTRICT product,
                                 const uint8_t* ACE_RESTRICT mask, const float* ACE_RESTRICT dense,
                                 const float* ACE_RESTRICT norm, float dual_scale, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    const float dual = choose(all_bits(mask[j]), 0.0f, dual_scale * weight[j]);
    weight[j] = to_float(product[j]) + dense[j] * norm[j] + dual;
  }
}

// Calls action(row) for all rows of weight, in threads.
template <class Action>
void for_rows(const at::Tensor& weight, Action&& action) {
  at::parallel_for(0, weight.size(0), row_grain(weight.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) action(i);
  });
}

template <class T>
void change_rows(const at::Tensor& change, const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& dense,
                 const at::Tensor& norm) {
  for_rows(weight, [&](int64_t i) {
    change_row(mutable_data<T>(change) + i * change.stride(0), data<float>(weight) + i * weight.stride(0),
               bytes(data<bool>(mask) + i * mask.stride(0)), data<float>(dense) + i * dense.stride(0),
               data<float>(norm), weight.size(1));
  });
}

template <class T>
void update_rows(const at::Tensor& weight, const at::Tensor& product, const at::Tensor& mask, const at::Tensor& dense,
                 const at::Tensor& norm, float dual_scale) {
  for_rows(weight, [&](int64_t i) {
    update_row(mutable_data<float>(weight) + i * weight.stride(0), data<T>(product) + i * product.stride(0),
               bytes(data<bool>(mask) + i * mask.stride(0)), data<float>(dense) + i * dense.stride(0),
               data<float>(norm), dual_scale, weight.size(1));
  });
}

void admm_change(at::Tensor change, const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& dense,
                 const at::Tensor& norm) {
  check_admm_change(change, weight, mask, dense, norm);
  const bool half = change.scalar_type() == at::kBFloat16;
  (half ? change_rows<BFloat16> : change_rows<float>)(change, weight, mask, dense, norm);
}

void admm_update(at::Tensor weight, const at::Tensor& product, const at::Tensor& mask, const at::Tensor& dense,
                 const at::Tensor& norm, double dual_scale) {
  check_admm_update(weight, product, mask, dense, norm);
  const bool half = product.scalar_type() == at::kBFloat16;
  (half ? update_rows<BFloat16> : update_rows<float>)(weight, product, mask, dense, norm,
                                                      static_cast<float>(dual_scale));
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("admm_change_", &admm_change);
  m.impl("admm_update_", &admm_update);
}

}  // namespace ace::cpu
