#!/usr/bin/env bash
# On a machine with a GPU: builds the extension for CUDA, runs the GPU tests, also under compute-sanitizer, and runs the
# benchmarks. Uses the torch of $PYTHON (built for CUDA) and the CUDA toolkit's nvcc; installs only into build/gpu.
#
#   make gpu        or: PYTHON=python3 tools/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu: torch finds no CUDA device")'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

rm -rf build/gpu
ACE_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --target build/gpu .
root=$PWD
export PYTHONPATH=$root/build/gpu
cd build/gpu  # outside the source tree, so that -m finds the built package
tests=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -m gpu)

"${tests[@]}" "$root/python_tests"

# Only small cases: these tools make a kernel a hundred times slower.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -z "$sanitizer" ]; then
  echo "gpu: no compute-sanitizer here: memcheck and racecheck were NOT run" >&2
else
  for tool in memcheck racecheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 1 "${tests[@]}" "$root/python_tests/test_gpu.py" \
      -k "two_runs or histograms or (nm_equals and 4)"
  done
fi

"$python" "$root/benchmarks/bench_ops.py" --device cuda --json "$root/build/gpu/bench_ops.json"
"$python" "$root/benchmarks/bench_solvers.py" --device cuda
