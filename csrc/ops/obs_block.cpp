#include "ops/obs_block.h"

#include <torch/library.h>

#include "check.h"

namespace ace {

void check_obs_block(const at::Tensor& weight, const at::Tensor& error, const at::Tensor& mask,
                     const at::Tensor& factor, int64_t keep_n, int64_t group_m) {
  constexpr std::string_view op = "obs_block_";
  check_2d(op, "weight", weight);
  check_like(op, "weight", weight, at::kFloat, weight.sizes(), weight);
  check_like(op, "error", error, at::kFloat, weight.sizes(), weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_like(op, "factor", factor, at::kFloat, {weight.size(1), weight.size(1)}, weight);
  check_apart(op, {named("weight", weight), named("error", error), named("mask", mask)}, {named("factor", factor)});
  check_optional_nm(op, weight, keep_n, group_m);
}

namespace {

void obs_block_meta(at::Tensor weight, at::Tensor error, at::Tensor mask, const at::Tensor& factor, int64_t keep_n,
                    int64_t group_m) {
  check_obs_block(weight, error, mask, factor, keep_n, group_m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "obs_block_(Tensor(a!) weight, Tensor(b!) error, Tensor(c!) mask, Tensor factor, int keep_n=0, int group_m=0)"
      " -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("obs_block_", &obs_block_meta); }

}  // namespace ace
