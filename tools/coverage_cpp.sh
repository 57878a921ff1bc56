#!/usr/bin/env bash
# Prints which share of lines and branches of csrc the C++ tests reach: the maths, the CUDA kernels on the host, and, if
# there is an nvcc, the runner of their PTX. The ops' files that need torch are not in it: the Python tests run those.
#
#   tools/coverage_cpp.sh [build folder]            needs gcovr; GCOV names the gcov of the compiler
#   tools/coverage_cpp.sh --core [build folder]     csrc/core alone, by its own tests: half a minute
#
# A branch is counted once for each instance of a template.
set -euo pipefail
cd "$(dirname "$0")/.."
reached=(--filter csrc/ --exclude csrc/tests/) core=false
if [ "${1-}" = --core ]; then
  core=true reached=(--filter csrc/core/)
  shift
fi
build=${1:-build/cpp-coverage}
command -v gcovr >/dev/null || { echo "coverage_cpp: no gcovr: pip install gcovr" >&2; exit 2; }
find "$build" -name '*.gcda' -delete 2>/dev/null || true
if $core; then
  tests=()
  for test in csrc/tests/core_*_test.cpp; do tests+=("$(basename "$test" .cpp)"); done
  cmake -S . -B "$build" -DACE_COVERAGE=ON --log-level=WARNING >/dev/null
  cmake --build "$build" --parallel "${JOBS:-2}" --target "${tests[@]}" >/dev/null
  for test in "${tests[@]}"; do
    "$build/$test" --gtest_brief=1 >"$build/$test.log" || { cat "$build/$test.log" >&2; exit 1; }
  done
else
  ACE_CMAKE_OPTIONS=-DACE_COVERAGE=ON tools/test_cpp.sh "$build" ""
fi
# The runner of PTX comes to some lines more than the 2^32 times from which on gcovr takes a count for an error.
gcovr "$build" --root . "${reached[@]}" --gcov-executable "${GCOV:-gcov}" \
  --exclude-throw-branches --exclude-unreachable-branches --merge-mode-functions=merge-use-line-min \
  --gcov-ignore-parse-errors=negative_hits.warn_once_per_file --gcov-suspicious-hits-threshold 0 \
  --txt - --txt-metric line --txt-metric branch --txt-summary
