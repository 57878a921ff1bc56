#!/usr/bin/env bash
# Builds the C++ tests of the core and of the CPU's loops for 64-bit ARM and runs them in an emulator; and checks the
# syntax of the CPU's ops for ARM against torch's headers.
#
#   tools/check_arm.sh BUILD_FOLDER    PYTHON names an interpreter with torch
#
# Needs Debian's packages g++-aarch64-linux-gnu (or another cross compiler in CXX), qemu-user and googletest.
set -euo pipefail
cd "$(dirname "$0")/.."
CXX=${CXX:-$(command -v aarch64-linux-gnu-g++ || command -v aarch64-linux-gnu-g++-{15,14,13,12} | head -1 || true)}
[ -n "$CXX" ] && command -v qemu-aarch64 >/dev/null || {
  echo "check_arm: needs a cross compiler for aarch64 and qemu-aarch64" >&2
  exit 1
}
gtest=${GTEST_SOURCE:-/usr/src/googletest/googletest}
torch=$("${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
python=$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
folder=$1
mkdir -p "$folder"
for part in gtest-all gtest_main; do
  [ -e "$folder/$part.o" ] || "$CXX" -std=c++17 -O1 -I "$gtest" -I "$gtest/include" -c "$gtest/src/$part.cc" -o "$folder/$part.o"
done
run_test() {
  name=$(basename "$1" .cpp)
  "$CXX" -std=c++20 -O2 -Wall -Wextra -Werror -ffp-contract=off -I csrc -isystem "$gtest/include" "$1" \
    "$folder"/gtest*.o -static -Wl,--no-warnings -o "$folder/$name"
  qemu-aarch64 "$folder/$name" --gtest_brief=1
}
check() {
  "$CXX" -std=c++20 -fsyntax-only -I csrc -isystem "$torch" -isystem "$torch/torch/csrc/api/include" -isystem "$python" "$1"
}
export -f run_test check
export CXX gtest folder torch python
printf '%s\n' csrc/tests/{core,cpu}_*_test.cpp | xargs -P "${JOBS:-2}" -I{} bash -c 'set -e; run_test {}'
printf '%s\n' csrc/{cpu,ops}/*.cpp | xargs -P "${JOBS:-2}" -I{} bash -c 'set -e; check {}'
echo "check_arm: the C++ tests passed in the emulator; csrc/cpu and csrc/ops compile against torch's headers"
