// balance_mean_.
#include "cuda/balance.cuh"
#include "cuda/balance.h"
#include "cuda/dispatch.cuh"

namespace ace::cuda {
namespace {

constexpr int64_t kWaves = 16;

}  // namespace

cudaError_t launch_balance_mean(const BalanceArguments& a, int64_t* swaps, int code, cudaStream_t stream) {
  if (a.rows == 0 || a.cols == 0) return cudaSuccess;
  if (a.cols > 0x3fffffff) return cudaErrorInvalidValue;  // 32-bit column indices, with room for the last stride
  NotFinite report{nullptr, code};
  ACE_RETURN_IF_ERROR(not_finite_flag(&report.flag));
  int64_t blocks = 0;
  ACE_RETURN_IF_ERROR(blocks_for((a.rows + kBalanceWarps - 1) / kBalanceWarps, kWaves, &blocks));
  return with_dtype(a.dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const BalanceProblem<T> problem{static_cast<const T*>(a.weight),
                                    a.mask,
                                    a.variance,
                                    a.mean,
                                    swaps,
                                    a.rows,
                                    a.weight_stride,
                                    a.mask_stride,
                                    a.rounds,
                                    static_cast<int>(a.cols),
                                    a.group_m};
    const Launch at{blocks, kBalanceWarps * kWarpSize, 0, stream};
    return a.group_m > 0 ? launch(balance_mean_kernel<T, true>, at, problem, report)
                         : launch(balance_mean_kernel<T, false>, at, problem, report);
  });
}

}  // namespace ace::cuda
