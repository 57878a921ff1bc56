#!/usr/bin/env bash
# Compiles every .cu with nvcc; needs no GPU. Warnings are errors, and no kernel may spill a register or use a stack
# frame. Prints a table: for each file and architecture the kernels, their registers, shared memory and spills.
# Nothing is run on a GPU: this checks the generated code, not its speed.
#
#   tools/check_nvcc.sh [output folder]        ACE_CUDA_ARCHS="80 90" names the architectures
#
# The folder keeps NAME.sm_NN.cubin for tools/check_sass.py, and .log for tools/check_registers.py. All are made of the PTX
# for sm_80, by tools/make_ptx.sh in build/ptx.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/nvcc}
archs=${ACE_CUDA_ARCHS:-80 90}
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
[ -x "$nvcc" ] || { echo "check_nvcc: no nvcc: put it on PATH or name it in NVCC" >&2; exit 2; }
mkdir -p "$out"

compile() {  # name arch
  "$nvcc" -O3 -Werror all-warnings -Xptxas -v -arch="sm_$2" -cubin \
    "build/ptx/sm_80/$1.ptx" -o "$out/$1.sm_$2.cubin" >"$out/$1.sm_$2.log" 2>&1 && return
  cat "$out/$1.sm_$2.log" >&2
  return 255  # xargs stops
}
ACE_CUDA_ARCHS=80 NVCC=$nvcc tools/make_ptx.sh build/ptx
export -f compile
export nvcc out

# As in make_ptx.sh: those that take longest first.
for source in $(ls -r csrc/cuda/prune_*.cu) $(ls csrc/cuda/*.cu | grep -v /prune_); do
  for arch in $archs; do echo "$(basename "$source" .cu) $arch"; done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1"'

awk '
  FNR == 1 { name = FILENAME; sub(/.*\//, "", name); sub(/\.log$/, "", name); order[++files] = name }
  /bytes stack frame/ { frame[name] += $1; spill[name] += $5 + $9 }
  /Used [0-9]+ registers/ {
    match($0, /Used [0-9]+/); r = substr($0, RSTART + 5, RLENGTH - 5) + 0
    shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH - 11) + 0 : 0
    kernels[name]++
    if (r > registers[name]) registers[name] = r
    if (shared > most[name]) most[name] = shared
  }
  END {
    printf "%-28s %8s %14s %13s %12s %12s\n", "file", "kernels", "max registers", "static shared", \
      "stack bytes", "spill bytes"
    for (i = 1; i <= files; ++i) {
      name = order[i]
      printf "%-28s %8d %14d %13d %12d %12d\n", name, kernels[name], registers[name], most[name], \
        frame[name], spill[name]
      bad += frame[name] + spill[name] + (kernels[name] == 0)
    }
    if (bad) { print "check_nvcc: a kernel spills or uses a stack frame" > "/dev/stderr"; exit 1 }
    print "check_nvcc: no stack frame, no spill (compiled only, not run on a GPU)"
  }' $(for arch in $archs; do ls "$out"/*."sm_$arch".log; done)
