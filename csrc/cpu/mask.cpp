// The masks of the same selections, on the CPU.
#include "ops/mask.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/selection.h"
#include "ops/prune.h"

namespace ace::cpu {
namespace {

// An uninitialised mask tensor, and the outcome that writes its rows.
struct Mask {
  explicit Mask(const at::Tensor& weight)
      : tensor(at::empty(weight.sizes(), weight.options().dtype(at::kBool))),
        rows{mutable_data<bool>(tensor), weight.size(1)} {}

  struct Rows {
    bool* data;
    int64_t cols;
    MaskRow operator()(int64_t i) const { return {data + i * cols}; }
  };

  at::Tensor tensor;
  Rows rows;
};

at::Tensor topk_mask(const at::Tensor& weight, std::string_view formula, int64_t keep_k, const OptionalTensor& column,
                     const OptionalTensor& moment, std::string_view group_name) {
  const Formula checked = check_scored("topk_mask", weight, formula, column, moment);
  const Group group = check_topk("topk_mask", weight, keep_k, group_name);
  const Mask mask(weight);
  with_scored("topk_mask", checked, weight, column, moment, [&](const auto& matrix) {
    if (group == Group::row) {
      select_rows(matrix, mask.rows, keep_k, nullptr);
    } else {
      select_matrix(matrix, mask.rows, keep_k);
    }
  });
  return mask.tensor;
}

at::Tensor nm_mask(const at::Tensor& weight, std::string_view formula, int64_t keep_n, int64_t group_m,
                   const OptionalTensor& column, const OptionalTensor& moment) {
  const Formula checked = check_scored("nm_mask", weight, formula, column, moment);
  check_nm("nm_mask", weight, keep_n, group_m);
  const Mask mask(weight);
  with_scored("nm_mask", checked, weight, column, moment, [&](const auto& matrix) {
    select_groups(matrix, mask.rows, static_cast<int>(keep_n), static_cast<int>(group_m));
  });
  return mask.tensor;
}

}  // namespace

TORCH_LIBRARY_IMPL(ace_ext, CPU, m) {
  m.impl("topk_mask", &topk_mask);
  m.impl("nm_mask", &nm_mask);
}

}  // namespace ace::cpu
