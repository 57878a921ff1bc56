#!/usr/bin/env bash
# Builds the whole extension for CUDA and imports it; needs nvcc, but neither a GPU nor a driver. It makes a virtual
# environment with a CUDA torch, compiles every .cu with nvcc, and checks that
#   - the extension reports a CUDA build, and the dispatcher has a CUDA kernel of every op;
#   - the CPU tests pass on that build.
# No kernel is run on a GPU.
#
#   tools/check_cuda_build.sh [folder, default build/cuda]
#     TORCH         what pip installs, default torch==2.11.* (built for CUDA 13; 2.7 GB to download, 4.8 GB on disk)
#     PYTHON        the interpreter of the environment, default python3
#     PYTEST_ARGS   default -q; "none" skips the tests
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mkdir -p "${1:-build/cuda}" && cd "${1:-build/cuda}" && pwd)
python=$work/venv/bin/python

# A constraint or a folder of wheels in pip's configuration may pin a CPU-only torch.
install() { PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' "$python" -m pip install --quiet "$@"; }

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$work/venv"
install "${TORCH:-torch==2.11.*}" numpy ninja 'setuptools>=77' wheel pytest hypothesis \
  transformers safetensors tqdm datasets accelerate gguf
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} ACE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0;9.0}
# From a copy: a build in the tree would mix its object files with those of a CPU build.
rm -rf "$work/source" && mkdir "$work/source"
cp -r "$root"/{ace_ext,csrc,setup.py,pyproject.toml,README.md} "$work/source"
install --no-build-isolation --force-reinstall --no-deps "$work/source"

cd "$work"  # outside the source tree, so that the installed package is imported
"$python" - "$root"/csrc/ops/*.cpp <<'CHECK'
import re
import sys
from pathlib import Path

import torch

import ace_ext

info = ace_ext.build_info()
assert info["cuda"], info
schemas = [op for path in sys.argv[1:] for op in re.findall(r'"(\w+)\(Tensor', Path(path).read_text())]
assert len(schemas) >= 12, schemas
for op in schemas:
    for key in ("CPU", "CUDA", "Meta"):
        found = torch._C._dispatch_has_kernel_for_dispatch_key(f"ace_ext::{op}", key)
        assert found, f"ace_ext::{op} has no {key} kernel"
print(f"check_cuda_build: {info}")
print(f"check_cuda_build: {len(schemas)} ops with CPU, CUDA and Meta kernels; GPU present: {torch.cuda.is_available()}")
CHECK
if [ "${PYTEST_ARGS:-}" != none ]; then
  # shellcheck disable=SC2086  # several arguments
  "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" "$root/python_tests" -m "not gpu" ${PYTEST_ARGS:--q}
fi
echo "check_cuda_build: built with nvcc and imported; not run on a GPU"
