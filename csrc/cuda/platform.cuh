// What stands in for CUDA: nvcc's own, the host engine of csrc/simt (the C++ tests define ACE_SIMT), or for a plain
// compiler only the runtime's types. The one header of the back end that knows of the host engine.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// The name in the parentheses of `extern __shared__` must be one for the whole program, of one type.
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
