#include "ops/balance.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

namespace ace {

void check_balance_mean(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& variance,
                        const at::Tensor& mean, int64_t group_m, int64_t rounds) {
  constexpr std::string_view op = "balance_mean_";
  check_matrix(op, "weight", weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_same_device(op, "variance", variance, weight);
  check_dense(op, "variance", variance, at::kFloat, {weight.size(1)});
  check_same_device(op, "mean", mean, weight);
  check_dense(op, "mean", mean, at::kFloat, {weight.size(1)});
  check_apart(op, {named("mask", mask)}, {named("weight", weight), named("variance", variance), named("mean", mean)});
  if (group_m != 0) check_nm(op, weight, 0, group_m);
  ACE_CHECK(rounds >= 0, op, ": rounds must not be negative (got ", rounds, ")");
}

namespace {

at::Tensor balance_mean_meta(at::Tensor mask, const at::Tensor& weight, const at::Tensor& variance,
                             const at::Tensor& mean, int64_t group_m, int64_t rounds) {
  check_balance_mean(mask, weight, variance, mean, group_m, rounds);
  return at::empty_symint({weight.sym_size(0)}, weight.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "balance_mean_(Tensor(a!) mask, Tensor weight, Tensor variance, Tensor mean, int group_m=0, int rounds=1)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("balance_mean_", &balance_mean_meta); }

}  // namespace ace
