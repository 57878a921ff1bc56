// prune_topk_ and topk_mask, group "row".
#include "cuda/dispatch.cuh"
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "cuda/prune_rows.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 8;
constexpr size_t kStaticShared = 10 * 1024;  // the kernel's static counters and scratch, rounded up

// Threads of a block: enough packs for each thread to amortise its share of the histogram. With short rows, fewer
// threads leave room for more blocks on a multiprocessor.
int row_threads(int64_t cols) {
  return cols <= 4096 ? kMaxRowThreads / 4 : cols <= 16384 ? kMaxRowThreads / 2 : kMaxRowThreads;
}

template <class Out>
cudaError_t select_rows(const ScoredArguments& m, int64_t keep_k, Out out, void* sums, int code, cudaStream_t stream) {
  if (m.cols > 0xffffffffLL) return cudaErrorInvalidValue;  // row counters have 32 bits
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int64_t blocks = 0, shared = 0;
  ACE_RETURN_IF_ERROR(blocks_for(m.rows, kWaves, &blocks));
  ACE_RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared));
  const bool held = row_held_bytes(m.cols) + kStaticShared <= static_cast<size_t>(shared);
  return with_scored(m, sums, stream, [&](auto formula, auto matrix) {
    using F = decltype(formula);
    using T = std::remove_pointer_t<decltype(matrix.weight)>;
    if (held) {
      return launch(prune_rows_kernel<F, T, true, Out>, {blocks, row_threads(m.cols), row_held_bytes(m.cols), stream},
                    matrix, keep_k, listed_columns(m.cols), out, report);
    }
    return launch(prune_rows_kernel<F, T, false, Out>, {blocks, kMaxRowThreads, 0, stream}, matrix, keep_k, 0, out,
                  report);
  });
}

}  // namespace

cudaError_t launch_prune_rows(const ScoredArguments& m, int64_t keep_k, float* threshold, void* sums, int code,
                              cudaStream_t stream) {
  return select_rows(m, keep_k, PruneOutcome{threshold}, sums, code, stream);
}

cudaError_t launch_mask_rows(const ScoredArguments& m, int64_t keep_k, bool* mask, void* sums, int code,
                             cudaStream_t stream) {
  return select_rows(m, keep_k, mask_outcome(mask, m.cols), sums, code, stream);
}

}  // namespace ace::cuda
