#!/usr/bin/env bash
# Configures, builds and runs the C++ tests: tools/test_cpp.sh BUILD_FOLDER "" | address,undefined | thread
# Those of the CUDA kernels run on the kernels' source, and again on the PTX that nvcc makes of it, if there is an nvcc.
# ACE_CUDA_ARCHS="80 90" names the architectures.
set -euo pipefail
cd "$(dirname "$0")/.."
folders=""
if [ -x "${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}" ]; then
  tools/make_ptx.sh build/ptx
  for arch in ${ACE_CUDA_ARCHS:-80 90}; do folders+="$PWD/build/ptx/sm_$arch;"; done
else
  echo "test_cpp: no nvcc, so the kernels are tested as source only, NOT as PTX" >&2
fi
cmake -S . -B "$1" -DACE_SANITIZE="$2" -DACE_PTX_FOLDERS="${folders%;}" --log-level=WARNING >/dev/null
cmake --build "$1" --parallel "${JOBS:-2}"
# The emulator runs kernels on fibres; with the use-after-return check of their stacks the tests take 20 times as long.
ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=0}" \
  ctest --test-dir "$1" --output-on-failure --parallel "${JOBS:-2}"
