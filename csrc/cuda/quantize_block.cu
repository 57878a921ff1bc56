// quantize_block_.
#include "cuda/dispatch.cuh"
#include "cuda/quantize_block.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;
constexpr int64_t kRowsOfBlock = kQuantizeWarps * kQuantizeRows;

}  // namespace

size_t quantize_block_bytes() { return sizeof(int); }

cudaError_t launch_quantize_block(const QuantizeArguments& a, void* workspace, int code, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return cudaSuccess;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int* unusable = static_cast<int*>(workspace);
  ACE_RETURN_IF_ERROR(cudaMemsetAsync(unusable, 0, sizeof *unusable, stream));
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(a.width, kWaves, &blocks));
  ACE_RETURN_IF_ERROR(launch(check_quantize_factor_kernel, {blocks, kQuantizeThreads, 0, stream}, a.factor, a.width,
                             a.factor_stride, unusable));
  ACE_RETURN_IF_ERROR(blocks_for((a.rows + kRowsOfBlock - 1) / kRowsOfBlock, kWaves, &blocks));
  return with_dtype(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return launch(quantize_block_kernel<T>, {blocks, kQuantizeThreads, 0, stream}, a, unusable, report);
  });
}

}  // namespace ace::cuda
