// prune_nm_ and nm_mask.
#include "cuda/dispatch.cuh"
#include "cuda/mask.h"
#include "cuda/prune.h"
#include "cuda/prune_nm.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;

template <class F, int kGroup, class T, class Out>
cudaError_t launch_pack(const Scored<T>& matrix, int keep_n, Out out, const NotFinite& report, cudaStream_t stream) {
  const int64_t tiles = tall_tiles(matrix.rows, matrix.cols);
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(tiles, kWaves, &blocks));
  return launch(prune_nm_pack_kernel<F, T, kGroup, Out>, {blocks, kTileThreads, 0, stream}, matrix, tiles, keep_n, out,
                report);
}

template <class F, class T, class Out>
cudaError_t launch_lane(const Scored<T>& matrix, int keep_n, int group_m, Out out, const NotFinite& report,
                        cudaStream_t stream) {
  constexpr int64_t kWarps = kTileThreads / kWarpSize;
  const int64_t columns = warp_columns(group_m), steps = matrix.rows * ((matrix.cols + columns - 1) / columns);
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((steps + kWarps - 1) / kWarps, kWaves, &blocks));
  return launch(prune_nm_lane_kernel<F, T, Out>, {blocks, kTileThreads, 0, stream}, matrix, keep_n, group_m, out,
                report);
}

template <class Out>
cudaError_t select_nm(const ScoredArguments& m, int keep_n, int group_m, Out out, void* sums, int code,
                      cudaStream_t stream) {
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  return with_scored(m, sums, stream, [&](auto formula, auto matrix) {
    using F = decltype(formula);
    switch (group_m) {
      case 2: return launch_pack<F, 2>(matrix, keep_n, out, report, stream);
      case 4: return launch_pack<F, 4>(matrix, keep_n, out, report, stream);
      case 8: return launch_pack<F, 8>(matrix, keep_n, out, report, stream);
      default: return launch_lane<F>(matrix, keep_n, group_m, out, report, stream);
    }
  });
}

}  // namespace

cudaError_t launch_prune_nm(const ScoredArguments& m, int keep_n, int group_m, void* sums, int code,
                            cudaStream_t stream) {
  return select_nm(m, keep_n, group_m, PruneOutcome{nullptr}, sums, code, stream);
}

cudaError_t launch_mask_nm(const ScoredArguments& m, int keep_n, int group_m, bool* mask, void* sums, int code,
                           cudaStream_t stream) {
  return select_nm(m, keep_n, group_m, mask_outcome(mask, m.cols), sums, code, stream);
}

}  // namespace ace::cuda
