// refine_swaps_.
#include "cuda/dispatch.cuh"
#include "cuda/swaps.cuh"
#include "cuda/swaps.h"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 4;

// The parts of the workspace, in this order.
struct SwapWorkspace {
  int64_t blocks;
  size_t c, root, diagonal, unusable;  // bytes
};

cudaError_t swap_workspace(const SwapArguments& a, SwapWorkspace* parts) {
  ACE_RETURN_IF_ERROR(blocks_for(a.rows, kWaves, &parts->blocks));
  parts->c = sizeof(double) * static_cast<size_t>(parts->blocks * a.cols);
  parts->root = sizeof(double) * static_cast<size_t>(a.cols);
  parts->diagonal = sizeof(float) * static_cast<size_t>(a.cols);
  parts->unusable = sizeof(int);
  return cudaSuccess;
}

}  // namespace

cudaError_t refine_swaps_bytes(const SwapArguments& a, size_t* bytes) {
  SwapWorkspace parts;
  ACE_RETURN_IF_ERROR(swap_workspace(a, &parts));
  *bytes = parts.c + parts.root + parts.diagonal + parts.unusable;
  return cudaSuccess;
}

cudaError_t launch_refine_swaps(const SwapArguments& a, int64_t* swaps, void* workspace, int code,
                                cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  // Columns are counted in 32 bits, with room for the last stride; a larger gram would not fit any device.
  if (a.cols > 0x3fffffff) return cudaErrorInvalidValue;
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  SwapWorkspace parts;
  ACE_RETURN_IF_ERROR(swap_workspace(a, &parts));
  double* c = static_cast<double*>(workspace);
  double* root = c + parts.blocks * a.cols;
  float* diagonal = reinterpret_cast<float*>(root + a.cols);
  int* unusable = reinterpret_cast<int*>(diagonal + a.cols);
  ACE_RETURN_IF_ERROR(cudaMemsetAsync(unusable, 0, parts.unusable, stream));
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for(a.cols, kWaves, &blocks));
  const int cols = static_cast<int>(a.cols);
  ACE_RETURN_IF_ERROR(
      launch(read_gram_kernel, {blocks, kSwapThreads, 0, stream}, a.gram, cols, diagonal, root, unusable));
  return with_dtype(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const SwapProblem<T> problem{static_cast<const T*>(a.weight),
                                 a.mask,
                                 a.gram,
                                 diagonal,
                                 root,
                                 unusable,
                                 c,
                                 swaps,
                                 a.rows,
                                 a.weight_stride,
                                 a.mask_stride,
                                 a.max_swaps,
                                 cols,
                                 a.keep_n,
                                 a.group_m};
    return launch(refine_swaps_kernel<T>, {parts.blocks, kSwapThreads, 0, stream}, problem, report);
  });
}

}  // namespace ace::cuda
