// Runs CUDA C++ kernel source on the host, block by block: the unchanged kernels of csrc/cuda, under plain g++ and its
// sanitizers. Defines the qualifiers and intrinsics that these kernels use, and the part of the CUDA runtime that their
// launchers call; no CUDA header is needed. Not supported: inline PTX, cp.async, CUB, <<<>>>, `extern __shared__` (the
// last two are in launch.cuh and platform.cuh).
//
// Static shared variables become function statics. Blocks run one after another, so each block has them alone, but they
// keep the values of earlier blocks.
#pragma once

#if defined(__CUDACC__)
#error "this header stands in for nvcc"
#endif

#include <cmath>

#include "simt/launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__ __restrict

#define threadIdx (simt::self().index)
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())

using dim3 = simt::Dim3;

// --- block barriers ---

inline void __syncthreads(int line = __builtin_LINE()) { simt::sync_threads(line); }

inline int __syncthreads_or(int vote, int line = __builtin_LINE()) { return simt::barrier(vote, line) != 0; }

inline int __syncthreads_count(int vote, int line = __builtin_LINE()) { return simt::barrier(vote, line); }

// --- warp collectives ---

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  simt::collective(simt::Op::sync, mask, {}, line);
}

inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return static_cast<unsigned>(simt::collective(simt::Op::ballot, mask, {vote != 0, 0}, line));
}

// If the source lane is outside the warp, the lane keeps its static part value, as on hardware.
template <class T>
T simt_shuffle(unsigned mask, T value, int source, int line) {
  const unsigned lane = simt::self().lane;
  const unsigned from = source >= 0 && source < static_cast<int>(simt::kWarp) ? static_cast<unsigned>(source) : lane;
  return simt::from_bits<T>(simt::collective(simt::Op::shuffle, mask, {simt::to_bits(value), from}, line));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return simt_shuffle(mask, value, source & 31, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return simt_shuffle(mask, value, static_cast<int>(simt::self().lane) ^ distance, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
  return simt_shuffle(mask, value, static_cast<int>(simt::self().lane) - static_cast<int>(distance), line);
}

// --- bits and atomics ---

inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <class T>
T atomicAdd(T* place, T value) {
  return __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}

inline int atomicMax(int* place, int value) {
  int seen = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(place, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

// --- the part of the CUDA runtime that the launchers need; a stream runs everything immediately ---

using cudaStream_t = void*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::settings.device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::settings.processors
                                                       : static_cast<int>(simt::settings.max_shared);
  return cudaSuccess;
}

// A kernel's shared memory limits, by its address.
struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // its own
  int maxDynamicSharedSizeBytes;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  const simt::SharedLimit& limit = simt::shared_limit(reinterpret_cast<const void*>(kernel));
  *attributes = {limit.fixed, static_cast<int>(limit.dynamic)};
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  simt::SharedLimit& limit = simt::shared_limit(reinterpret_cast<const void*>(kernel));
  if (bytes < 0 || limit.fixed + static_cast<size_t>(bytes) > simt::settings.max_shared) return cudaErrorInvalidValue;
  limit.dynamic = static_cast<size_t>(bytes);
  ++simt::shared_limit_changes;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* place, int byte, size_t bytes, cudaStream_t) {
  std::memset(place, byte, bytes);
  return cudaSuccess;
}
