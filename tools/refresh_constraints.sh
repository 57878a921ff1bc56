#!/usr/bin/env bash
# Writes .ci/constraints.txt: one release of each package that CI installs, for Python 3.11 and later (the tools need
# it; the package itself runs on 3.10). Run it from time to time, run .ci/run, and commit the file if all is well.
#
#   tools/refresh_constraints.sh                   # the newest releases
#   tools/refresh_constraints.sh 'torch==2.13.*'   # with conditions
#
# Packages that only torch's build for CUDA requires are left out: torch names their versions itself.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
PIP_CONSTRAINT= "$work/venv/bin/pip" install --quiet uv
printf '%s\n' "$@" >"$work/conditions.txt"
printf '%s\n' build ninja pip setuptools wheel >"$work/build.txt"
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --extra test --extra report \
  --no-header --no-annotate --constraints "$work/conditions.txt" pyproject.toml .ci/tools.txt "$work/build.txt" \
  >"$work/found.txt"
{
  echo "# What CI installs, so that a release elsewhere does not break it. Made by tools/refresh_constraints.sh${1:+ $*}"
  grep -Ev '^(nvidia-|cuda-|triton==)' "$work/found.txt"
  grep -E '^nvidia-cuda-nvdisasm==' "$work/found.txt"
} >"$work/new.txt"
mv "$work/new.txt" .ci/constraints.txt
wc -l .ci/constraints.txt
