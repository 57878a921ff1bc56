// refine_swaps_: one block for each row exchanges kept and removed weights while the row's exact loss falls
// (core/swaps.h).
//
// Contract
//   mask       [rows, cols], rewritten; swaps [rows] is the number of swaps, -1 where the row was left unchanged.
//   ties       the lower restored column first, then the lower removed one.
//   same bits  as the CPU: c = G e is float64, products are exact in it and are added in the order of the columns.
//   refused    a row with a weight that is not finite, or with groups that do not keep keep_n, is left unchanged, and
//              every row if gram is not finite; the flag is raised.
//
// Method: c is in global memory, 8 bytes for each column and block. Only the thread of a column reads and writes its
// entry, so it stays in the L1 cache. A swap reads two rows of G and costs two block reductions (one with a pattern).
// To compute c the first time, a thread keeps kColumnsInFlight entries in registers while the block goes through the
// removed columns' rows of G. Compiled and run on the host only: not run on a GPU.
#pragma once

#include "core/swaps.h"
#include "cuda/block.cuh"
#include "cuda/scored.cuh"

namespace ace::cuda {

constexpr int kSwapThreads = kNormLanes;  // thread t is lane t of the sum of norms
constexpr int kSwapWarps = kSwapThreads / kWarpSize;
constexpr int kColumnsInFlight = 4;

template <class T>
struct SwapProblem {
  const T* weight;        // [rows, cols], rows `weight_stride` apart
  bool* mask;             // [rows, cols], rows `mask_stride` apart
  const float* gram;      // [cols, cols]
  const float* diagonal;  // [cols], of gram
  const double* root;     // [cols], of the diagonal
  const int* unusable;    // not 0 if gram is not finite
  double* c;              // [blocks, cols]
  int64_t* swaps;         // [rows]
  int64_t rows, weight_stride, mask_stride, max_swaps;
  int cols, keep_n, group_m;
};

// As above, for the row of one block.
template <class T>
struct BlockRow {
  const T* weight;
  bool* mask;
  const float* gram;
  const float* diagonal;
  const double* root;
  double* c;
  int cols;

  ACE_DEVICE double value(int j) const { return static_cast<double>(to_float(weight[j])); }
  ACE_DEVICE double norm(int j) const { return output_norm(value(j), root[j]); }
  ACE_DEVICE const float* gram_row(int j) const { return gram + static_cast<int64_t>(j) * cols; }
};

// A swap, or one half of it; -1 if there is no candidate.
struct Candidate {
  double change;
  int restored, removed;
};

struct SwapScratch {
  BlockScratch scan;
  double warp_norm[kSwapWarps];
  double weight[kSwapThreads];  // removed weights of a stretch, packed
  int column[kSwapThreads];
  Candidate restored[kSwapWarps], removed[kSwapWarps];
};

constexpr Candidate kNothing{1.7976931348623157e308, -1, -1};  // after all others: no real change is so large

ACE_DEVICE bool is_before(const Candidate& a, const Candidate& b) {
  if (a.change != b.change) return a.change < b.change;
  return a.restored != b.restored ? a.restored < b.restored : a.removed < b.removed;
}

// The least of the block's candidates, in every thread. One barrier; `warps` may be reused after the next barrier.
ACE_DEVICE Candidate block_least(Candidate mine, Candidate* warps) {
  ACE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const Candidate other{__shfl_xor_sync(kFullWarp, mine.change, distance),
                          __shfl_xor_sync(kFullWarp, mine.restored, distance),
                          __shfl_xor_sync(kFullWarp, mine.removed, distance)};
    if (is_before(other, mine)) mine = other;
  }
  if (lane_id() == 0) warps[warp_id()] = mine;
  __syncthreads();
  Candidate least = warps[0];
  for (int w = 1; w < kSwapWarps; ++w) {
    if (is_before(warps[w], least)) least = warps[w];
  }
  return least;
}

// Visits this thread's columns.
template <class Body>
ACE_DEVICE void for_columns(int cols, Body&& body) {
  for (int j = static_cast<int>(threadIdx.x); j < cols; j += kSwapThreads) body(j);
}

// Checks that gram is finite; writes its diagonal and the diagonal's root, contiguous.
__global__ void __launch_bounds__(kSwapThreads)
    read_gram_kernel(const float* gram, int cols, float* diagonal, double* root, int* unusable) {
  bool finite = true;
  for (int i = static_cast<int>(blockIdx.x); i < cols; i += static_cast<int>(gridDim.x)) {
    const float* row = gram + static_cast<int64_t>(i) * cols;
    for_columns(cols, [&](int j) { finite &= is_finite(row[j]); });
    if (threadIdx.x == 0) {
      diagonal[i] = row[i];
      root[i] = diagonal_root(static_cast<double>(row[i]));
    }
  }
  if (!finite) atomicMax(unusable, 1);
}

template <class T>
ACE_DEVICE bool row_is_usable(const SwapProblem<T>& problem, const BlockRow<T>& row) {
  bool usable = *problem.unusable == 0;
  for_columns(row.cols, [&](int j) { usable &= is_finite(to_float(row.weight[j])); });
  if (problem.group_m > 0) {
    for_columns(row.cols / problem.group_m, [&](int group) {
      int kept = 0;
      for (int g = 0; g < problem.group_m; ++g) kept += row.mask[group * problem.group_m + g];
      usable &= kept == problem.keep_n;
    });
  }
  return __syncthreads_or(!usable) == 0;
}

template <class T>
ACE_DEVICE double sum_of_norms(const BlockRow<T>& row, SwapScratch& scratch) {
  double sum = 0.0;
  for_columns(row.cols, [&](int j) { sum += row.norm(j); });
  sum = warp_sum(sum);
  if (lane_id() == 0) scratch.warp_norm[warp_id()] = sum;
  __syncthreads();
  sum = 0.0;
  for (int w = 0; w < kSwapWarps; ++w) sum += scratch.warp_norm[w];
  return sum;
}

// Packs the removed weights among kSwapThreads columns into the scratch, in their order; returns how many. Ends with a
// barrier.
template <class T>
ACE_DEVICE int gather_removed(const BlockRow<T>& row, int first, SwapScratch& scratch) {
  const int j = first + static_cast<int>(threadIdx.x);
  const bool removed = j < row.cols && !row.mask[j];
  int64_t count = 0;
  const int64_t at = exclusive_scan(int64_t{removed}, scratch.scan, &count);
  if (removed) {
    scratch.weight[at] = row.value(j);
    scratch.column[at] = j;
  }
  __syncthreads();
  return static_cast<int>(count);
}

// c = G e.
template <class T>
ACE_DEVICE void start_row(const BlockRow<T>& row, SwapScratch& scratch) {
  for (int start = 0; start < row.cols; start += kSwapThreads * kColumnsInFlight) {
    const int base = start + static_cast<int>(threadIdx.x);
    double sum[kColumnsInFlight] = {};
    for (int first = 0; first < row.cols; first += kSwapThreads) {
      const int count = gather_removed(row, first, scratch);
      for (int n = 0; n < count; ++n) {
        const double weight = scratch.weight[n];
        const float* gram = row.gram_row(scratch.column[n]);
        ACE_UNROLL
        for (int f = 0; f < kColumnsInFlight; ++f) {
          const int k = base + f * kSwapThreads;
          if (k < row.cols) sum[f] += weight * static_cast<double>(gram[k]);
        }
      }
      __syncthreads();
    }
    ACE_UNROLL
    for (int f = 0; f < kColumnsInFlight; ++f) {
      const int k = base + f * kSwapThreads;
      if (k < row.cols) row.c[k] = sum[f];
    }
  }
  __syncthreads();
}

// The best weight to restore, then the best to remove after that.
template <class T>
ACE_DEVICE Candidate find_swap(const BlockRow<T>& row, SwapScratch& scratch) {
  Candidate best = kNothing;
  for_columns(row.cols, [&](int j) {
    if (row.mask[j]) return;
    const double change = loss_change(-row.value(j), row.c[j], static_cast<double>(row.diagonal[j]));
    if (is_before({change, j, -1}, best)) best = {change, j, -1};
  });
  const Candidate restored = block_least(best, scratch.restored);
  if (restored.restored < 0) return restored;
  const float* gram = row.gram_row(restored.restored);
  const double weight = row.value(restored.restored);
  best = kNothing;
  for_columns(row.cols, [&](int i) {
    if (!row.mask[i]) return;
    const double c = row.c[i] - weight * static_cast<double>(gram[i]);
    const double change = loss_change(row.value(i), c, static_cast<double>(row.diagonal[i]));
    if (is_before({change, restored.restored, i}, best)) best = {change, restored.restored, i};
  });
  best = block_least(best, scratch.removed);
  best.change = restored.change + best.change;
  return best;
}

// The best pair within any group.
template <class T>
ACE_DEVICE Candidate find_swap_in_groups(const BlockRow<T>& row, int group_m, SwapScratch& scratch) {
  Candidate best = kNothing;
  for_columns(row.cols, [&](int j) {
    if (row.mask[j]) return;
    const int group = j / group_m * group_m;
    const double weight = row.value(j);
    const double gain = loss_change(-weight, row.c[j], static_cast<double>(row.diagonal[j]));
    const float* gram = row.gram_row(j);
    for (int i = group; i < group + group_m; ++i) {
      if (!row.mask[i]) continue;
      const double c = row.c[i] - weight * static_cast<double>(gram[i]);
      const double change = gain + loss_change(row.value(i), c, static_cast<double>(row.diagonal[i]));
      if (is_before({change, j, i}, best)) best = {change, j, i};
    }
  });
  return block_least(best, scratch.restored);
}

template <class T>
ACE_DEVICE void apply_swap(const BlockRow<T>& row, const Candidate& swap) {
  const double added = row.value(swap.removed), taken = row.value(swap.restored);
  const float *add = row.gram_row(swap.removed), *take = row.gram_row(swap.restored);
  for_columns(row.cols, [&](int k) {
    row.c[k] = row.c[k] + added * static_cast<double>(add[k]) - taken * static_cast<double>(take[k]);
    if (k == swap.removed) row.mask[k] = false;
    if (k == swap.restored) row.mask[k] = true;
  });
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kSwapThreads) refine_swaps_kernel(SwapProblem<T> problem, NotFinite report) {
  __shared__ SwapScratch scratch;
  for (int64_t i = blockIdx.x; i < problem.rows; i += gridDim.x) {
    const BlockRow<T> row{problem.weight + i * problem.weight_stride,
                          problem.mask + i * problem.mask_stride,
                          problem.gram,
                          problem.diagonal,
                          problem.root,
                          problem.c + static_cast<int64_t>(blockIdx.x) * problem.cols,
                          problem.cols};
    if (!row_is_usable(problem, row)) {
      if (threadIdx.x == 0) {
        problem.swaps[i] = -1;
        raise_flag(report);
      }
      continue;
    }
    const double row_norm = sum_of_norms(row, scratch);
    start_row(row, scratch);
    int64_t made = 0;
    for (; made < problem.max_swaps; ++made) {
      const Candidate swap =
          problem.group_m > 0 ? find_swap_in_groups(row, problem.group_m, scratch) : find_swap(row, scratch);
      if (swap.restored < 0 || swap.removed < 0) break;
      const double norms = row.norm(swap.restored) + row.norm(swap.removed);
      if (!(swap.change < -swap_rounding(norms, row_norm, row.cols, made))) break;
      apply_swap(row, swap);
    }
    if (threadIdx.x == 0) problem.swaps[i] = made;
  }
}

}  // namespace ace::cuda
