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

# Every kernel by small cases: these tools make a kernel a hundred times slower. racecheck and synccheck look at shared
# memory and barriers, initcheck at device memory that is read before it is written.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -z "$sanitizer" ]; then
  echo "gpu: no compute-sanitizer here: memcheck, racecheck, synccheck and initcheck were NOT run" >&2
else
  small="scores_have and shape5 or topk_equals and (shape5 or shape6) or nm_equals or own_scores or histograms or across"
  small+=" or column_slices or empty or swaps or balancing or restoring or obs_equals or leave_alone or within_bounds"
  small+=" or flagged or two_runs"
  for tool in memcheck racecheck synccheck initcheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 1 "${tests[@]}" "$root/python_tests/ops/test_gpu.py" \
      -k "$small"
  done
fi

"$python" "$root/benchmarks/bench_ops.py" --device cuda --json "$root/build/gpu/bench_ops.json"
"$python" "$root/benchmarks/predict.py" --measured "$root/build/gpu/bench_ops.json"
"$python" "$root/benchmarks/bench_solvers.py" --device cuda
