// The ground the kernels stand on: nvcc, or the host runner of the tests. Includes nothing of torch.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// The name in the parentheses of `extern __shared__` must be one for the whole program, of one type.
#define ACE_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char ace_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(ace_dynamic_)
#define ACE_UNROLL _Pragma("unroll")
#else
#include "tests/simt/simt.h"
#define ACE_UNROLL
#define ACE_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::shared_memory())
#endif

#include "core/scalar.h"

#define ACE_DEVICE __device__ __forceinline__

namespace ace {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace ace
