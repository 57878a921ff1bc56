#include "ops/restore.h"

#include <torch/library.h>

#include "check.h"

namespace ace {

void check_restore_mean(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& mean,
                        const at::Tensor& direction) {
  constexpr std::string_view op = "restore_mean_";
  check_2d(op, "weight", weight);
  check_like(op, "weight", weight, at::kFloat, weight.sizes(), weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_same_device(op, "mean", mean, weight);
  check_dense(op, "mean", mean, at::kFloat, {weight.size(1)});
  check_same_device(op, "direction", direction, weight);
  check_dense(op, "direction", direction, at::kFloat, {weight.size(1)});
  check_apart(op, {named("weight", weight)}, {named("mask", mask), named("mean", mean), named("direction", direction)});
}

namespace {

void restore_mean_meta(at::Tensor weight, const at::Tensor& mask, const at::Tensor& mean, const at::Tensor& direction) {
  check_restore_mean(weight, mask, mean, direction);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def("restore_mean_(Tensor(a!) weight, Tensor mask, Tensor mean, Tensor direction) -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("restore_mean_", &restore_mean_meta); }

}  // namespace ace
