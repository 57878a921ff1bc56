// obs_block_.
#include "cuda/launch.cuh"
#include "cuda/obs_block.cuh"
#include "cuda/obs_block.h"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;
constexpr int64_t kRowsOfBlock = kObsWarps * kObsRows;

}  // namespace

cudaError_t launch_check_factor(const float* factor, int64_t width, int64_t stride, int* unusable,
                                cudaStream_t stream) {
  ACE_RETURN_IF_ERROR(cudaMemsetAsync(unusable, 0, sizeof *unusable, stream));
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(width, kWaves, &blocks));
  return launch(check_factor_kernel, {blocks, kObsThreads, 0, stream}, factor, width, stride, unusable);
}

size_t obs_block_bytes() { return sizeof(int); }

cudaError_t launch_obs_block(const ObsArguments& a, void* workspace, int code, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int* unusable = static_cast<int*>(workspace);
  ACE_RETURN_IF_ERROR(launch_check_factor(a.factor, a.width, a.factor_stride, unusable, stream));
  const int panel = a.group_m > 0 ? kWarpSize / a.group_m * a.group_m : kWarpSize;
  const ObsProblem problem{a.weight,        a.error,  a.mask,          a.factor,       unusable,
                           a.rows,          a.width,  a.weight_stride, a.error_stride, a.mask_stride,
                           a.factor_stride, a.keep_n, a.group_m,       panel};
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((a.rows + kRowsOfBlock - 1) / kRowsOfBlock, kWaves, &blocks));
  return launch(obs_block_kernel, {blocks, kObsThreads, 0, stream}, problem, report);
}

}  // namespace ace::cuda
