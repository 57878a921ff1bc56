// Platform shim: CUDA (nvcc), or the host emulator of csrc/simt (the C++ tests define ACE_SIMT), or only the runtime's
// types (a plain compiler). No other header of the back end depends on the emulator.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// All `extern __shared__` arrays of a program must have the same name and type.
#define ACE_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char ace_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(ace_dynamic_)
#define ACE_UNROLL _Pragma("unroll")
#elif defined(ACE_SIMT)
#include "simt/simt.h"
#define ACE_UNROLL
#define ACE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::shared_memory())
#else
#include <cuda_runtime_api.h>
#endif

#include "core/scalar.h"

#define ACE_DEVICE __device__ __forceinline__

namespace ace::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace ace::cuda
