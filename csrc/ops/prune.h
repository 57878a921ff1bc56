// Pruning in place, within one matrix.
//
//   prune_topk_(weight!, formula, keep_k, column=None, moment=None, group="row") -> threshold
//       group "row": keeps keep_k in [0, cols] of each row; threshold [rows] float32.
//       group "matrix": keeps keep_k in [0, rows * cols] of the matrix; threshold [1] float32.
//       threshold: the smallest kept score (+0.0 for both zeros); +inf where nothing is kept.
//   prune_nm_(weight!, formula, keep_n, group_m, column=None, moment=None)
//       keeps keep_n of each group_m consecutive columns; 0 <= keep_n <= group_m <= 32, group_m divides cols.
#pragma once

#include <cstdint>
#include <string_view>

#include "ops.h"

namespace ace {

enum class Group { row, matrix };

Group check_topk(std::string_view op, const at::Tensor& weight, int64_t keep_k, std::string_view group);

}  // namespace ace
