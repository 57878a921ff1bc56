// quantize_block_.
#include "cuda/dispatch.cuh"
#include "cuda/obs_block.h"
#include "cuda/quantize_block.cuh"
#include "cuda/quantize_block.h"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;
constexpr int64_t kRowsOfBlock = kObsWarps * kObsRows;

}  // namespace

size_t quantize_block_bytes() { return sizeof(int); }

cudaError_t launch_quantize_block(const QuantizeArguments& a, void* workspace, int code, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int* unusable = static_cast<int*>(workspace);
  ACE_RETURN_IF_ERROR(launch_check_factor(a.factor, a.width, a.factor_stride, unusable, stream));
  const ObsProblem problem{
      a.weight,       a.error,       const_cast<bool*>(a.mask), a.factor, unusable, a.rows,   a.width, a.weight_stride,
      a.error_stride, a.mask_stride, a.factor_stride,           0,        0,        kWarpSize};
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((a.rows + kRowsOfBlock - 1) / kRowsOfBlock, kWaves, &blocks));
  return with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const QuantizeGrid<T> grid{static_cast<const T*>(a.scale), a.current, a.current_stride, CodeRange(a.bits)};
    return launch(quantize_block_kernel<T>, {blocks, kObsThreads, 0, stream}, problem, grid, report);
  });
}

}  // namespace ace::cuda
