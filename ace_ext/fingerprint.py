"""What changed between a record on the disk and what is asked for now: a refusal has to name it."""

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import torch


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Return the SHA-256, in hex, of a token tensor of any shape: its shape, then its ids, as little-endian int64."""
    digest = hashlib.sha256(torch.tensor(tokens.shape).numpy().astype("<i8").tobytes())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def fingerprint_of_files(files: Iterable[Path]) -> dict[str, str]:
    """For each file its size and a SHA-256 of its first MiB, with the header, and of 1024 samples of 4 KiB evenly over
    all of it: another checkpoint differs there, also where only some matrices were tuned, and reading 100 GB to be
    surer would take longer than a block."""
    found = {}
    for path in files:
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            for offset in range(2**20, size, max(2**12, (size - 2**20) // 2**10)):
                file.seek(offset)
                digest.update(file.read(2**12))
        found[path.name] = f"{size} bytes, {digest.hexdigest()[:16]}"
    return found


def differences(recorded: dict, wanted: dict) -> list[str]:
    """``"name was 1, now 2"`` for each name, nested ones joined by dots, under which the two differ.

    ``recorded`` has been through JSON; ``wanted`` goes through it here.
    """
    return _differences(recorded, json.loads(json.dumps(wanted)), "")


def _differences(recorded: dict, wanted: dict, prefix: str) -> list[str]:
    found = []
    for key in sorted({*recorded, *wanted}):
        before, now = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {_short(before)}, now {_short(now)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def versions() -> dict:
    """The versions that a result depends on."""
    import transformers

    from ace_ext.ops._extension import build_info

    return {
        "ace_ext": build_info()["version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "compiler": build_info()["compiler"],
    }
