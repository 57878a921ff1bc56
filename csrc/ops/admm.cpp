#include "ops/admm.h"

#include <torch/library.h>

#include "check.h"

namespace ace {
namespace {

// What both ops read, and `other`, which is change or product.
void check_all(std::string_view op, std::string_view name, const at::Tensor& other, const at::Tensor& weight,
               const at::Tensor& mask, const at::Tensor& dense, const at::Tensor& norm) {
  check_2d(op, "weight", weight);
  check_like(op, "weight", weight, at::kFloat, weight.sizes(), weight);
  const at::ScalarType dtype = other.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  check_like(op, name, other, dtype, weight.sizes(), weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_like(op, "dense", dense, at::kFloat, weight.sizes(), weight);
  check_same_device(op, "norm", norm, weight);
  check_dense(op, "norm", norm, at::kFloat, {weight.size(1)});
}

}  // namespace

void check_admm_change(const at::Tensor& change, const at::Tensor& weight, const at::Tensor& mask,
                       const at::Tensor& dense, const at::Tensor& norm) {
  constexpr std::string_view op = "admm_change_";
  check_all(op, "change", change, weight, mask, dense, norm);
  check_apart(op, {named("change", change)},
              {named("weight", weight), named("mask", mask), named("dense", dense), named("norm", norm)});
}

void check_admm_update(const at::Tensor& weight, const at::Tensor& product, const at::Tensor& mask,
                       const at::Tensor& dense, const at::Tensor& norm) {
  constexpr std::string_view op = "admm_update_";
  check_all(op, "product", product, weight, mask, dense, norm);
  check_apart(op, {named("weight", weight)},
              {named("product", product), named("mask", mask), named("dense", dense), named("norm", norm)});
}

namespace {

void admm_change_meta(at::Tensor change, const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& dense,
                      const at::Tensor& norm) {
  check_admm_change(change, weight, mask, dense, norm);
}

void admm_update_meta(at::Tensor weight, const at::Tensor& product, const at::Tensor& mask, const at::Tensor& dense,
                      const at::Tensor& norm, double) {
  check_admm_update(weight, product, mask, dense, norm);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def("admm_change_(Tensor(a!) change, Tensor weight, Tensor mask, Tensor dense, Tensor norm) -> ()");
  m.def(
      "admm_update_(Tensor(a!) weight, Tensor product, Tensor mask, Tensor dense, Tensor norm, float dual_scale) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("admm_change_", &admm_change_meta);
  m.impl("admm_update_", &admm_update_meta);
}

}  // namespace ace
