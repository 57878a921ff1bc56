#!/usr/bin/env bash
# On a machine with a GPU: builds the extension for CUDA, runs the GPU tests, looks for races and bad accesses, measures.
# Uses the torch of $PYTHON (built for CUDA) and the CUDA toolkit's nvcc; installs into build/gpu alone.
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
cd build/gpu  # in the source tree, -m would find the sources there and not what was built
tests=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -m gpu)

"${tests[@]}" "$root/python_tests"

# Small cases: under these tools a kernel takes a hundred times as long.
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
