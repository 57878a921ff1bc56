#include "ops/prune.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "ops/score.h"

namespace ace {

Group check_topk(std::string_view op, const at::Tensor& weight, int64_t keep_k, std::string_view group) {
  ACE_CHECK(group == "row" || group == "matrix", op, ": group must be 'row' or 'matrix' (got '", group, "')");
  const int64_t size = group == "row" ? weight.size(1) : weight.size(0) * weight.size(1);
  ACE_CHECK(keep_k >= 0 && keep_k <= size, op, ": keep_k must be from 0 to ", size, " (got ", keep_k, ")");
  return group == "row" ? Group::row : Group::matrix;
}

namespace {

at::Tensor prune_topk_meta(at::Tensor weight, std::string_view formula, int64_t keep_k, const OptionalTensor& column,
                           const OptionalTensor& moment, std::string_view group) {
  check_scored("prune_topk_", weight, formula, column, moment);
  const bool rows = check_topk("prune_topk_", weight, keep_k, group) == Group::row;
  return at::empty_symint({rows ? weight.sym_size(0) : c10::SymInt(1)}, weight.options().dtype(at::kFloat));
}

void prune_nm_meta(at::Tensor weight, std::string_view formula, int64_t keep_n, int64_t group_m,
                   const OptionalTensor& column, const OptionalTensor& moment) {
  check_scored("prune_nm_", weight, formula, column, moment);
  check_nm("prune_nm_", weight, keep_n, group_m);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ace_ext, m) {
  m.def(
      "prune_topk_(Tensor(a!) weight, str formula, int keep_k, Tensor? column=None, Tensor? moment=None,"
      " str group='row') -> Tensor");
  m.def(
      "prune_nm_(Tensor(a!) weight, str formula, int keep_n, int group_m, Tensor? column=None, Tensor? moment=None)"
      " -> ()");
}

TORCH_LIBRARY_IMPL(ace_ext, Meta, m) {
  m.impl("prune_topk_", &prune_topk_meta);
  m.impl("prune_nm_", &prune_nm_meta);
}

}  // namespace ace
