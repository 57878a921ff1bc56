#!/usr/bin/env bash
# Prints which share of lines and branches of csrc the C++ tests reach: the maths, the CUDA kernels on the host, and, if
# there is an nvcc, the runner of their PTX. The ops' files that need torch are not in it: the Python tests run those.
#
#   tools/coverage_cpp.sh [build folder]        needs gcovr; GCOV names the gcov of the compiler
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/cpp-coverage}
command -v gcovr >/dev/null || { echo "coverage_cpp: no gcovr: pip install gcovr" >&2; exit 2; }
find "$build" -name '*.gcda' -delete 2>/dev/null || true
ACE_CMAKE_OPTIONS=-DACE_COVERAGE=ON tools/test_cpp.sh "$build" ""
gcovr "$build" --root . --filter csrc/ --exclude csrc/tests/ --gcov-executable "${GCOV:-gcov}" \
  --exclude-throw-branches --exclude-unreachable-branches --merge-mode-functions=merge-use-line-min \
  --gcov-ignore-parse-errors=negative_hits.warn_once_per_file --txt - --txt-metric line --txt-metric branch --txt-summary
