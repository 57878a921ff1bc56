#include "ops/moments.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

namespace ace {

void check_update_moments(const at::Tensor& weight_sum, const at::Tensor& mean, const at::Tensor& m2,
                          const at::Tensor& x, const OptionalTensor& token_weight) {
  constexpr std::string_view op = "update_moments_";
  check_matrix(op, "x", x);
  if (token_weight) {
    check_same_device(op, "token_weight", *token_weight, x);
    check_dense(op, "token_weight", *token_weight, at::kFloat, {x.size(0)});
  }
  const at::ScalarType dtype = mean.scalar_type();
  ACE_CHECK(dtype == at::kFloat || dtype == at::kDouble, op, ": mean must be float32 or float64 (got ", dtype, ")");
  check_same_device(op, "weight_sum", weight_sum, x);
  check_same_device(op, "mean", mean, x);
  check_same_device(op, "m2", m2, x);
  check_dense(op, "weight_sum", weight_sum, dtype, {});
  check_dense(op, "mean", mean, dtype, {x.size(1)});
  check_dense(op, "m2", m2, dtype, {x.size(1)});
  check_apart(op, {named("weight_sum", weight_sum), named("mean", mean), named("m2", m2)},
              {named("x", x), named("token_weight", token_weight)});
}

void check_inverse_square_norm(const at::Tensor& a) { check_matrix("inverse_square_norm", "a", a); }

void check_update_cosine_moment(const at::Tensor& moment, const at::Tensor& x, const at::Tensor& a) {
  constexpr std::string_view op = "update_cosine_moment_";
  check_matrix(op, "x", x);
  check_matrix(op, "a", a);
  check_same_device(op, "a", a, x);
  ACE_CHECK(a.scalar_type() == x.scalar_type(), op, ": a must have the dtype of x, ", x.scalar_type(), " (got ",
            a.scalar_type(), ")");
  ACE_CHECK(a.size(0) == x.size(0), op, ": a must have the ", x.size(0), " tokens of x (got ", a.size(0), ")");
  check_same_device(op, "moment", moment, x);
  check_dense(op, "moment", moment, at::kFloat, {a.size(1), x.size(1)});
  check_apart(op, {named("moment", moment)}, {named("x", x), named("a", a)});
}

namespace {

at::Tensor inverse_square_norm_meta(const at::Tensor& a) {
  check_inverse_square_norm(a);
  return at::empty_symint({a.sym_size(0)}, a.options().dtype(at::kFloat));
}

void update_moments_meta(at::Tensor weight_sum, at::Tensor mean, at::Tensor m2, const at::Tensor& x,
                         const OptionalTensor& token_weight) {
  check_update_moments(weight_sum, mean, m2, x, token_weight);
}

void update_cosine_moment_meta(at::Tensor moment, const at::Tensor& x, const at::Tensor& a) {
  check_update_cosine_moment(moment, x, a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "update_moments_(Tensor(a!) weight_sum, Tensor(b!) mean, Tensor(c!) m2, Tensor x, Tensor? token_weight=None)"
      " -> ()");
  m.def("inverse_square_norm(Tensor a) -> Tensor");
  m.def("update_cosine_moment_(Tensor(a!) moment, Tensor x, Tensor a) -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("update_moments_", &update_moments_meta);
  m.impl("inverse_square_norm", &inverse_square_norm_meta);
  m.impl("update_cosine_moment_", &update_cosine_moment_meta);
}

}  // namespace ace
