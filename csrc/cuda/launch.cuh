// The only way to launch a kernel, and the device's limits. Grids are capped: every kernel is a grid-stride loop with
// 64-bit indices, so any grid does all the work.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/platform.cuh"

namespace ace::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;  // dynamic
  cudaStream_t stream;
};

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's x

#define ACE_RETURN_IF_ERROR(call)               \
  do {                                          \
    const cudaError_t status_ = (call);         \
    if (status_ != cudaSuccess) return status_; \
  } while (0)

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int64_t* value) {
  int device = 0, result = 0;
  ACE_RETURN_IF_ERROR(cudaGetDevice(&device));
  ACE_RETURN_IF_ERROR(cudaDeviceGetAttribute(&result, attribute, device));
  *value = result;
  return cudaSuccess;
}

// The number of blocks for `work` units, one unit for each block at a time: enough to fill the device `waves` times, at
// most `work`.
inline cudaError_t blocks_for(int64_t work, int64_t waves, int64_t* blocks) {
  int64_t processors = 0;
  ACE_RETURN_IF_ERROR(device_attribute(cudaDevAttrMultiProcessorCount, &processors));
  *blocks = std::max<int64_t>(1, std::min({work, waves * processors, kMaxBlocks}));
  return cudaSuccess;
}

// Allows a kernel all the shared memory that its static part leaves for dynamic use. By default both together are
// limited to 48 KiB. Set once for each kernel and device, by the first thread that needs it; also possible during graph
// capture, because no stream is involved.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...)) {
  static std::mutex mutex;
  static std::set<std::pair<void (*)(Params...), int>> allowed;
  int device = 0;
  ACE_RETURN_IF_ERROR(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  int64_t most = 0;
  cudaFuncAttributes own;
  ACE_RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most));
  ACE_RETURN_IF_ERROR(cudaFuncGetAttributes(&own, kernel));
  ACE_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(most - static_cast<int64_t>(own.sharedSizeBytes))));
  allowed.emplace(kernel, device);
  return cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const Launch& at, Args... args) {
  const dim3 grid(static_cast<unsigned>(std::min(at.blocks, kMaxBlocks))), block(static_cast<unsigned>(at.threads));
  if (at.shared_bytes > 0) ACE_RETURN_IF_ERROR(allow_shared(kernel));
#if defined(__CUDACC__)
  kernel<<<grid, block, at.shared_bytes, at.stream>>>(args...);
  return cudaGetLastError();
#else
  return simt::launch(kernel, grid, block, at.shared_bytes, args...);
#endif
}

}  // namespace ace::cuda
