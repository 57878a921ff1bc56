#!/usr/bin/env bash
# Configures, builds and runs the C++ tests: tools/test_cpp.sh BUILD_FOLDER "" | address,undefined | thread
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B "$1" -DACE_SANITIZE="$2" --log-level=WARNING >/dev/null
cmake --build "$1" --parallel "${JOBS:-2}"
# The emulator runs kernels on fibres; with the use-after-return check of their stacks the tests take 20 times as long.
ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=0}" \
  ctest --test-dir "$1" --output-on-failure --parallel "${JOBS:-2}"
