#!/usr/bin/env bash
# Configures, builds and runs the C++ tests: tools/test_cpp.sh BUILD_FOLDER "" | address,undefined | thread
# Those of the CUDA kernels run on the kernels' source, and again on the PTX that nvcc makes of it, if there is an nvcc: that
# for sm_80, and of other architectures what differs from it.
# Then the kernels' instructions are counted on it; more than recorded is a failure (benchmarks/predict.py).
# ACE_CUDA_ARCHS="80 90" names the architectures; with sanitizers the PTX is run only if it is set, as that takes long.
# ACE_KERNELS_ONLY=ON leaves out the tests of csrc/core and csrc/cpu.
# With sanitizers the kernels are built and tested for float16 only if ACE_ALL_TYPES=ON: they read the same places as for
# bfloat16. With ThreadSanitizer nor are they tested for bfloat16 then: threads meet in the same places for each type, and
# these tests take most of the time. Nor does the test of left-out barriers run there, which the other builds run.
set -euo pipefail
cd "$(dirname "$0")/.."
folders="" archs=${ACE_CUDA_ARCHS-} all_types=${ACE_ALL_TYPES:-OFF}
if [[ "$all_types" != ON && "$all_types" != OFF ]]; then
  echo "test_cpp: ACE_ALL_TYPES must be ON or OFF (got $all_types)" >&2
  exit 2
fi
[ -n "$2" ] || archs=${archs:-80}
if [ -z "$archs" ]; then
  echo "test_cpp: with sanitizers the kernels are tested as source only; ACE_CUDA_ARCHS=80 runs their PTX too" >&2
elif [ -x "${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}" ]; then
  ACE_CUDA_ARCHS=$archs tools/make_ptx.sh build/ptx
  for arch in $archs; do
    if [ -n "$folders" ] && diff -r -I '^\.target ' "${folders%%;*}" "build/ptx/sm_$arch" >/dev/null; then
      echo "test_cpp: the PTX for sm_$arch is the first one but for its target: not run again"
    else
      folders+="$PWD/build/ptx/sm_$arch;"
    fi
  done
else
  echo "test_cpp: no nvcc, so the kernels are tested as source only, NOT as PTX" >&2
fi
cmake -S . -B "$1" ${ACE_CMAKE_OPTIONS-} -DACE_SANITIZE="$2" -DACE_PTX_FOLDERS="${folders%;}" \
  -DACE_KERNELS_ONLY="${ACE_KERNELS_ONLY:-OFF}" -DACE_ALL_TYPES="$all_types" --log-level=WARNING >/dev/null
cmake --build "$1" --parallel "${JOBS:-2}"
left_out=()
if [ -n "$2" ] && [ "$all_types" = OFF ]; then
  echo "test_cpp: with sanitizers the kernels for float16 are left out; ACE_ALL_TYPES=ON runs them too" >&2
  if [ "$2" = thread ]; then
    left_out=(--exclude-regex '<ace::BFloat16>|^Barriers\.')
    echo "test_cpp: with ThreadSanitizer those for bfloat16 too" >&2
  fi
fi
# The emulator runs kernels on fibres; with the use-after-return check of their stacks the tests take 20 times as long.
ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=0}" \
  ctest --test-dir "$1" --output-on-failure --parallel "${JOBS:-2}" "${left_out[@]}"
# The kernels' instructions an element.
if [ -z "$2" ] && [[ "$folders" == *sm_80* ]]; then
  python3 benchmarks/predict.py --build "$1" --check
fi
