#include "ops/mask.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "ops/prune.h"
#include "ops/score.h"

namespace ace {
namespace {

at::Tensor empty_mask(const at::Tensor& weight) {
  return at::empty_symint(weight.sym_sizes(), weight.options().dtype(at::kBool));
}

at::Tensor topk_mask_meta(const at::Tensor& weight, std::string_view formula, int64_t keep_k,
                          const OptionalTensor& column, const OptionalTensor& moment, std::string_view group) {
  check_scored("topk_mask", weight, formula, column, moment);
  check_topk("topk_mask", weight, keep_k, group);
  return empty_mask(weight);
}

at::Tensor nm_mask_meta(const at::Tensor& weight, std::string_view formula, int64_t keep_n, int64_t group_m,
                        const OptionalTensor& column, const OptionalTensor& moment) {
  check_scored("nm_mask", weight, formula, column, moment);
  check_nm("nm_mask", weight, keep_n, group_m);
  return empty_mask(weight);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "topk_mask(Tensor weight, str formula, int keep_k, Tensor? column=None, Tensor? moment=None, str group='row')"
      " -> Tensor");
  m.def(
      "nm_mask(Tensor weight, str formula, int keep_n, int group_m, Tensor? column=None, Tensor? moment=None)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("topk_mask", &topk_mask_meta);
  m.impl("nm_mask", &nm_mask_meta);
}

}  // namespace ace
