// Launches a kernel under a GPU's rules: from its source, or from the PTX that nvcc made of it (ptx/kernel.h).
#pragma once

#include <map>
#include <tuple>
#include <utility>

#include "simt/ptx/kernel.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace simt {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

// A kernel's shared memory for each block: its static part, and how much more a launch may request on the current
// device.
struct SharedLimit {
  size_t fixed, dynamic;
};

inline SharedLimit& shared_limit(const void* kernel) {
  static std::map<std::pair<const void*, int>, SharedLimit> limits;
  const std::pair<const void*, int> key{kernel, settings.device};
  const auto found = limits.find(key);
  if (found != limits.end()) return found->second;
  const ptx::Kernel* compiled = ptx::kernel_at(kernel);
  const size_t fixed = compiled != nullptr ? compiled->dynamic_at : 0;  // the source's are static variables
  return limits.emplace(key, SharedLimit{fixed, kSharedWithoutAsking - fixed}).first->second;
}

// How often any kernel's limit was changed.
inline int shared_limit_changes = 0;

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), Dim3 grid, Dim3 block, size_t shared_bytes, Args... args) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const SharedLimit& limit = shared_limit(address);
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || threads == 0 || threads > kMaxThreads || shared_bytes > limit.dynamic) {
    return cudaErrorInvalidValue;
  }
  const ptx::Kernel* compiled = ptx::kernel_at(address);
  if (compiled == nullptr) {
    run(grid, block, shared_bytes, [&] { kernel(args...); });
    return cudaSuccess;
  }
  if (compiled->max_threads != 0 && threads > compiled->max_threads) return cudaErrorInvalidValue;
  const std::tuple<Params...> parameters(args...);
  const void* places[sizeof...(Params)];
  std::apply(
      [&](const auto&... parameter) {
        size_t n = 0;
        ((places[n++] = &parameter), ...);
      },
      parameters);
  run(grid, block, compiled->dynamic_at + shared_bytes, [&] { compiled->run(places); });
  return cudaSuccess;
}

}  // namespace simt
