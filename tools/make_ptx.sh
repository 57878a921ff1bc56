#!/usr/bin/env bash
# Compiles every .cu to PTX: OUT/sm_NN/NAME.ptx, only where its source or a header is newer. Warnings are errors. The C++
# tests run these files on the host (tools/test_cpp.sh), and tools/check_nvcc.sh makes machine code of them. No kernel asks
# for more than sm_80 has, so that PTX serves newer ones: `make nightly-cpp` compares it with theirs.
#
#   tools/make_ptx.sh [output folder, default build/ptx]        ACE_CUDA_ARCHS="80 90" names others than 80
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/ptx}
archs=${ACE_CUDA_ARCHS:-80}
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[ -x "$nvcc" ] || { echo "make_ptx: no nvcc: put it on PATH or name it in NVCC" >&2; exit 2; }

compile() {  # name arch
  local file="$out/sm_$2/$1.ptx"
  # Its own source and every header; of other .cu files it knows nothing.
  if [ -e "$file" ] && [ -z "$(find "csrc/cuda/$1.cu" csrc/core/*.h csrc/cuda/*.h csrc/cuda/*.cuh -newer "$file")" ]; then
    return
  fi
  "$nvcc" -std=c++17 -O3 --fmad=false -Werror all-warnings -arch="compute_$2" -ptx -I csrc "csrc/cuda/$1.cu" -o "$file.new" &&
    mv "$file.new" "$file" || return 255  # xargs stops
}
export -f compile
export nvcc out

for arch in $archs; do mkdir -p "$out/sm_$arch"; done
# Those that take longest first: rows, N:M, matrix.
for source in $(ls -r csrc/cuda/prune_*.cu) $(ls csrc/cuda/*.cu | grep -v /prune_); do
  for arch in $archs; do echo "$(basename "$source" .cu) $arch"; done
done | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'compile "$0" "$1"'
