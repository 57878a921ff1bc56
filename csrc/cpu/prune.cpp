// The ops that prune within a matrix, on the CPU.
#include "ops/prune.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/selection.h"

namespace ace::cpu {
namespace {

at::Tensor prune_topk(at::Tensor weight, std::string_view formula, int64_t keep_k, const OptionalTensor& column,
                      const OptionalTensor& moment, std::string_view group_name) {
  const Formula checked = check_scored("prune_topk_", weight, formula, column, moment);
  const Group group = check_topk("prune_topk_", weight, keep_k, group_name);
  at::Tensor threshold = at::empty({group == Group::row ? weight.size(0) : 1}, weight.options().dtype(at::kFloat));
  float* smallest = mutable_data<float>(threshold);
  with_scored("prune_topk_", checked, weight, column, moment, [&](const auto& matrix) {
    if (group == Group::row) {
      select_rows(matrix, prune_rows_of(matrix), keep_k, smallest);
    } else {
      *smallest = select_matrix(matrix, prune_rows_of(matrix), keep_k);
    }
  });
  return threshold;
}

void prune_nm(at::Tensor weight, std::string_view formula, int64_t keep_n, int64_t group_m,
              const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("prune_nm_", weight, formula, column, moment);
  check_nm("prune_nm_", weight, keep_n, group_m);
  with_scored("prune_nm_", checked, weight, column, moment, [&](const auto& matrix) {
    select_groups(matrix, prune_rows_of(matrix), static_cast<int>(keep_n), static_cast<int>(group_m));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("prune_topk_", &prune_topk);
  m.impl("prune_nm_", &prune_nm);
}

}  // namespace ace::cpu
