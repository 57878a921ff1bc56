#include "cuda/not_finite.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <mutex>
#include <vector>

#include "cuda/arguments.h"
#include "cuda/glue.h"

namespace ace::cuda {
namespace {

std::mutex names_mutex;
std::vector<std::string>& names() {  // the op of code n + 1
  static std::vector<std::string> all;
  return all;
}

}  // namespace

int op_code(std::string_view op) {
  const std::lock_guard<std::mutex> lock(names_mutex);
  size_t n = 0;
  while (n < names().size() && names()[n] != op) ++n;
  if (n == names().size()) names().emplace_back(op);
  return static_cast<int>(n) + 1;
}

std::string read_and_clear_not_finite(c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  int* flag = nullptr;
  int code = 0;
  C10_CUDA_CHECK(not_finite_flag(&flag));
  C10_CUDA_CHECK(cudaMemcpyAsync(&code, flag, sizeof code, cudaMemcpyDeviceToHost, stream()));
  C10_CUDA_CHECK(cudaMemsetAsync(flag, 0, sizeof code, stream()));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream()));
  const std::lock_guard<std::mutex> lock(names_mutex);
  return code > 0 && static_cast<size_t>(code) <= names().size() ? names()[static_cast<size_t>(code) - 1] : "";
}

}  // namespace ace::cuda
