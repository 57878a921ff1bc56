// The search for a row's next swap, in plain loops that the compiler vectorises. Formulas: core/swaps.h.
#pragma once

#include <cstdint>
#include <limits>

#include "core/swaps.h"
#include "cpu/multiversion.h"

namespace ace::cpu {

// One row of the problem. All arrays have `cols` entries.
struct SwapRow {
  const double* weight;
  const double* norm;     // output_norm of each weight
  double* c;              // G e
  const float* diagonal;  // of G
  bool* mask;             // true where kept
  double row_norm;
  int64_t cols;
};

struct Swap {
  int64_t restored = -1, removed = -1;  // -1 if there is no candidate
  double change = std::numeric_limits<double>::infinity();
};

constexpr int64_t kSwapLanes = 16;  // independent minima, so that comparisons run in parallel

// change[j] of removing (kRemove) each kept weight after `restored` is restored, or of restoring each removed weight;
// infinite for the others. Returns the smallest. `gram_row` is G's row of the restored column.
template <bool kRemove>
ACE_MULTIVERSION double least_change(const SwapRow& row, const float* gram_row, double restored, double* change) {
  const double none = std::numeric_limits<double>::infinity();
  const auto at = [&](int64_t j) __attribute__((always_inline)) {
    const double w = row.weight[j], diagonal = row.diagonal[j];
    if (kRemove) return row.mask[j] ? loss_change(w, row.c[j] - restored * gram_row[j], diagonal) : none;
    return row.mask[j] ? none : loss_change(-w, row.c[j], diagonal);
  };
  double lane[kSwapLanes];
  for (double& least : lane) least = none;
  int64_t j = 0;
  for (; j + kSwapLanes <= row.cols; j += kSwapLanes) {
    for (int64_t l = 0; l < kSwapLanes; ++l) {
      const double value = at(j + l);
      change[j + l] = value;
      lane[l] = value < lane[l] ? value : lane[l];
    }
  }
  double least = none;
  for (const double value : lane) least = value < least ? value : least;
  for (; j < row.cols; ++j) {
    change[j] = at(j);
    least = change[j] < least ? change[j] : least;
  }
  return least;
}

// The lowest column with this change; -1 if the change is infinite.
inline int64_t column_of(const double* change, int64_t cols, double least) {
  if (least == std::numeric_limits<double>::infinity()) return -1;
  int64_t j = 0;
  while (j < cols - 1 && change[j] != least) ++j;
  return j;
}

// The best weight to restore, then the best to remove after that.
inline Swap best_swap(const SwapRow& row, const float* gram, double* change) {
  Swap swap;
  const double gain = least_change<false>(row, nullptr, 0.0, change);
  swap.restored = column_of(change, row.cols, gain);
  if (swap.restored < 0) return swap;
  const double cost = least_change<true>(row, gram + swap.restored * row.cols, row.weight[swap.restored], change);
  swap.removed = column_of(change, row.cols, cost);
  swap.change = gain + cost;
  return swap;
}

// The best pair of one group, the first in the order of (restored, removed) among equals. near[j * group_m + g] is
// G_ji for i the g-th column of j's group.
ACE_MULTIVERSION inline Swap best_swap_in_groups(const SwapRow& row, const float* near, int group_m) {
  Swap best;
  for (int64_t j = 0; j < row.cols; ++j) {
    if (row.mask[j]) continue;
    const int64_t first = j - j % group_m;
    const double restored = row.weight[j], gain = loss_change(-restored, row.c[j], row.diagonal[j]);
    for (int64_t i = first; i < first + group_m; ++i) {
      if (!row.mask[i]) continue;
      const double c = row.c[i] - restored * near[j * group_m + i - first];
      const double change = gain + loss_change(row.weight[i], c, row.diagonal[i]);
      if (change < best.change) best = {j, i, change};
    }
  }
  return best;
}

// Keeps c = G e, and the mask, up to date.
ACE_MULTIVERSION inline void apply_swap(const SwapRow& row, const float* gram, const Swap& swap) {
  const double added = row.weight[swap.removed], taken = row.weight[swap.restored];
  const float* add = gram + swap.removed * row.cols;
  const float* take = gram + swap.restored * row.cols;
  double* c = row.c;
  for (int64_t k = 0; k < row.cols; ++k) c[k] = c[k] + added * add[k] - taken * take[k];
  row.mask[swap.removed] = false;
  row.mask[swap.restored] = true;
}

// Swaps until no swap certainly lowers the loss; returns the number of swaps.
inline int64_t refine_row(const SwapRow& row, const float* gram, const float* near, int group_m, int64_t max_swaps,
                          double* change) {
  int64_t swaps = 0;
  for (; swaps < max_swaps; ++swaps) {
    const Swap swap = group_m > 0 ? best_swap_in_groups(row, near, group_m) : best_swap(row, gram, change);
    if (swap.restored < 0 || swap.removed < 0) break;
    const double norms = row.norm[swap.restored] + row.norm[swap.removed];
    if (!(swap.change < -swap_rounding(norms, row.row_norm, row.cols, swaps))) break;
    apply_swap(row, gram, swap);
  }
  return swaps;
}

}  // namespace ace::cpu
