// The selections of prune_topk_ and prune_nm_ (ops/prune.h) as a mask; the weight is only read.
//
//   topk_mask(weight, formula, keep_k, column=None, moment=None, group="row") -> mask
//   nm_mask(weight, formula, keep_n, group_m, column=None, moment=None) -> mask
//       mask [rows, cols] bool, contiguous: True where the pruning op with the same arguments keeps the weight. On CUDA
//       the mask is True wherever that op leaves a weight unchanged because a score is not finite.
#pragma once

#include "ops.h"
