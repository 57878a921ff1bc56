// One selection over several matrices (the whole model) that stores no scores. Three rounds of score_histogram, summed
// over the matrices, give the threshold's key; then prune_at_ applies it to each matrix. Call
// ace_ext.ops.prune_topk_across_, which does both.
//
//   score_histogram(weight, formula, prefix, level, column=None, moment=None) -> counts [2048, 2048, 1024][level] int64
//       counts of keys (core/order_key.h) by their digit of this level, among those whose digits above it equal those
//       of `prefix`.
//   prune_at_(weight!, formula, key, ties, column=None, moment=None)
//       keeps every key above `key` and the first `ties` (row-major) of those equal to it; the rest become +0.0.
#pragma once

#include <cstdint>

#include "ops.h"

namespace ace {

void check_score_histogram(int64_t prefix, int64_t level);
void check_prune_at(int64_t key, int64_t ties);

}  // namespace ace
