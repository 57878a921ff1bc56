#!/usr/bin/env bash
# Syntax-checks the CUDA glue with the host's compiler against the headers of any torch, also of a CPU-only one. Nothing
# is linked or run.
#
#   tools/check_glue.sh         PYTHON names an interpreter with torch, CUDA_HOME the toolkit with cuda_runtime_api.h
set -euo pipefail
cd "$(dirname "$0")/.."
shim=$(mktemp -d)
trap 'rm -rf "$shim"' EXIT
mkdir -p "$shim/c10/cuda/impl"  # the one header that only a CUDA build of torch generates
printf '#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n' >"$shim/c10/cuda/impl/cuda_cmake_macros.h"
torch=$("${PYTHON:-python3}" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
python=$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
# All in one file, as setup.py builds them: torch's headers take most of the time.
printf '#include "%s"\n' csrc/cuda/*.cpp csrc/module.cpp |
  "${CXX:-c++}" -std=c++20 -fsyntax-only -Wall -Wextra -Wno-unused-parameter -Werror -DACE_WITH_CUDA \
    -DACE_VERSION=0 -DACE_CUDA_VERSION=0 -I . -I csrc -isystem "$torch" -isystem "$torch/torch/csrc/api/include" \
    -isystem "$shim" -isystem "${CUDA_HOME:-/usr/local/cuda}/include" -isystem "$python" -x c++ -
echo "check_glue: csrc/cuda/*.cpp compile against torch's headers (not linked, not run)"
