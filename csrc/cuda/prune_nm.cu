// prune_nm_.
#include "cuda/dispatch.cuh"
#include "cuda/prune_nm.cuh"

namespace ace {
namespace {

constexpr int64_t kWaves = 16;

template <class F, class T, int kGroup>
cudaError_t launch_pack(const Scored<T>& matrix, int keep_n, const NotFinite& report, cudaStream_t stream) {
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(tile_count(matrix), kWaves, &blocks));
  return launch(prune_nm_pack_kernel<F, T, kGroup>, {blocks, kTileThreads, 0, stream}, matrix, tile_count(matrix),
                keep_n, report);
}

template <class F, class T>
cudaError_t launch_lane(const Scored<T>& matrix, int keep_n, int group_m, const NotFinite& report,
                        cudaStream_t stream) {
  constexpr int64_t kWarps = kTileThreads / kWarpSize;
  const int64_t columns = warp_columns(group_m), steps = matrix.rows * ((matrix.cols + columns - 1) / columns);
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((steps + kWarps - 1) / kWarps, kWaves, &blocks));
  return launch(prune_nm_lane_kernel<F, T>, {blocks, kTileThreads, 0, stream}, matrix, keep_n, group_m, report);
}

}  // namespace

cudaError_t launch_prune_nm(const ScoredArguments& m, int keep_n, int group_m, void* sums, int code,
                            cudaStream_t stream) {
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  return with_scored(m, sums, stream, [&](auto formula, auto matrix) {
    using F = decltype(formula);
    using T = std::remove_pointer_t<decltype(matrix.weight)>;
    switch (group_m) {
      case 2: return launch_pack<F, T, 2>(matrix, keep_n, report, stream);
      case 4: return launch_pack<F, T, 4>(matrix, keep_n, report, stream);
      case 8: return launch_pack<F, T, 8>(matrix, keep_n, report, stream);
      default: return launch_lane<F, T>(matrix, keep_n, group_m, report, stream);
    }
  });
}

}  // namespace ace
