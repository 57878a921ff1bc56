// The Python module. Importing it registers the ops with torch's dispatcher; build_info() returns the versions that it
// was built for.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <cstdint>

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

// Calls from Python keep the object that shows torch's warnings on their stack, and put back the one before when they
// return. Computations that alternate in one thread return in another order, so each must save and restore its own.
std::uintptr_t warning_handler() { return reinterpret_cast<std::uintptr_t>(c10::WarningUtils::get_warning_handler()); }

void set_warning_handler(std::uintptr_t handler) {
  c10::WarningUtils::set_warning_handler(reinterpret_cast<c10::WarningHandler*>(handler));
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
  m.def("warning_handler", &warning_handler, "The address of what shows torch's warnings in this thread.");
  m.def("set_warning_handler", &set_warning_handler, "Restores what warning_handler() returned in this thread.");
#if defined(ACE_WITH_CUDA)
  m.def("take_not_finite", &take_not_finite, "Name of an op that met NaN or infinity on this GPU since the last call.");
#endif
}
