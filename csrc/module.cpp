// The Python module. Importing it registers the ops with torch's dispatcher; build_info() returns the versions that it
// was built for.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "ops/plain.h"

#if defined(ACE_WITH_CUDA)
#include "cuda/not_finite.h"
#endif

#define ACE_STRING_(x) #x
#define ACE_STRING(x) ACE_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = ACE_STRING(ACE_VERSION);
  info["torch"] = TORCH_VERSION;
#if defined(ACE_WITH_CUDA)
  info["cuda"] = ACE_STRING(ACE_CUDA_VERSION);
#else
  info["cuda"] = pybind11::none();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cplusplus"] = static_cast<long>(__cplusplus);
  return info;
}

#if defined(ACE_WITH_CUDA)
std::string take_not_finite(int device_index) {
  return ace::cuda::read_and_clear_not_finite({c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device_index)});
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  ace::refuse_other_tensors();
  m.def("build_info", &build_info, "What this extension was built for: version, torch, cuda (or None), compiler.");
#if defined(ACE_WITH_CUDA)
  m.def("take_not_finite", &take_not_finite, "Name of an op that met NaN or infinity on this GPU since the last call.");
#endif
}
