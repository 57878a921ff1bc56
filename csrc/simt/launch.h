// Starts a kernel under the rules that a GPU has for it.
#pragma once

#include <functional>
#include <map>
#include <tuple>

#if defined(ACE_SIMT_THREADS)
#include "simt/thread_engine.h"
#else
#include "simt/fiber_engine.h"
#endif

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace simt {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Shared memory of a block of a kernel: what the kernel itself has, and how much more a launch may ask for.
struct SharedLimit {
  size_t fixed, dynamic;
};

inline SharedLimit& shared_limit(const void* kernel) {
  static std::map<const void*, SharedLimit> limits;
  const auto found = limits.find(kernel);
  if (found != limits.end()) return found->second;
  const size_t fixed = 0;  // a function's statics, in the source
  return limits.emplace(kernel, SharedLimit{fixed, kSharedWithoutAsking - fixed}).first->second;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Dim3 grid, Dim3 block, size_t shared_bytes, Args... args) {
  const SharedLimit& limit = shared_limit(reinterpret_cast<const void*>(kernel));
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || threads == 0 || threads > kMaxThreads || shared_bytes > limit.dynamic) {
    return cudaErrorInvalidValue;
  }
  run(grid, block, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace simt
