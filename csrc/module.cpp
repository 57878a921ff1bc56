// The importable module. Importing it registers the ops with torch's dispatcher; build_info() says what it was built for.
#include <pybind11/pybind11.h>
#include <torch/version.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What this extension was built for: version, torch, cuda (or None), compiler.");
}
