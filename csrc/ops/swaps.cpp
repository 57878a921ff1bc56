#include "ops/swaps.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"

namespace ace {

void check_refine_swaps(const at::Tensor& mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                        int64_t group_m, int64_t max_swaps) {
  constexpr std::string_view op = "refine_swaps_";
  check_matrix(op, "weight", weight);
  check_like(op, "mask", mask, at::kBool, weight.sizes(), weight);
  check_same_device(op, "gram", gram, weight);
  check_dense(op, "gram", gram, at::kFloat, {weight.size(1), weight.size(1)});
  check_apart(op, {named("mask", mask)}, {named("weight", weight), named("gram", gram)});
  check_optional_nm(op, weight, keep_n, group_m);
  ACE_CHECK(max_swaps >= 0, op, ": max_swaps must not be negative (got ", max_swaps, ")");
}

namespace {

at::Tensor refine_swaps_meta(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t keep_n,
                             int64_t group_m, int64_t max_swaps) {
  check_refine_swaps(mask, weight, gram, keep_n, group_m, max_swaps);
  return at::empty_symint({weight.sym_size(0)}, weight.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "refine_swaps_(Tensor(a!) mask, Tensor weight, Tensor gram, int keep_n=0, int group_m=0, int max_swaps=100)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) { m.impl("refine_swaps_", &refine_swaps_meta); }

}  // namespace ace
