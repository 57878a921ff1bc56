#include "ops/quantize_block.h"

#include <torch/library.h>

#include "check.h"

namespace ace {

void check_quantize_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                          const at::Tensor& scale, const at::Tensor& factor, int64_t bits,
                          const OptionalTensor& current) {
  constexpr std::string_view op = "quantize_block_";
  check_2d(op, "weight", weight);
  check_like(op, "weight", weight, at::kFloat, weight.sizes(), weight);
  check_like(op, "error", error, at::kFloat, weight.sizes(), weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  const at::ScalarType dtype = scale.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
            ": scale must be float32, float16 or bfloat16 (got ", dtype, ")");
  check_same_device(op, "scale", scale, weight);
  check_dense(op, "scale", scale, dtype, {weight.size(0)});
  check_like(op, "factor", factor, at::kFloat, {weight.size(1), weight.size(1)}, weight);
  if (current) check_like(op, "current", *current, at::kFloat, weight.sizes(), weight);
  check_apart(op, {named("weight", weight), named("error", error)},
              {named("mask", mask), named("scale", scale), named("factor", factor), named("current", current)});
  ACE_CHECK(bits >= 2 && bits <= 8, op, ": bits must be from 2 to 8 (got ", bits, ")");
}

namespace {

void quantize_block_meta(at::Tensor weight, at::Tensor error, const at::Tensor& mask, const at::Tensor& scale,
                         const at::Tensor& factor, int64_t bits, const OptionalTensor& current) {
  check_quantize_block(weight, error, mask, scale, factor, bits, current);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "quantize_block_(Tensor(a!) weight, Tensor(b!) error, Tensor mask, Tensor scale, Tensor factor, int bits,"
      " Tensor? current=None) -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("quantize_block_", &quantize_block_meta); }

}  // namespace ace
