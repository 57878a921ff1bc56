// restore_mean_.
#include "cuda/dispatch.cuh"
#include "cuda/restore.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;

}  // namespace

cudaError_t launch_restore_mean(const RestoreArguments& a, int code, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((a.rows + kRestoreWarps - 1) / kRestoreWarps, kWaves, &blocks));
  return launch(restore_mean_kernel, {blocks, kRestoreWarps * kWarpSize, 0, stream}, a, report);
}

}  // namespace ace::cuda
