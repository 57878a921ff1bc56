"""Hashes of files and token tensors, and the differences between two records by name.

A run that continues from recorded state first compares the record with the present arguments. If they differ, the
refusal names the difference.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def tokens_sha256(tokens: torch.Tensor) -> str:
    """The SHA-256, in hex, of a token tensor of any shape: of its shape, then of its ids, as little-endian int64."""
    digest = hashlib.sha256(torch.tensor(tokens.shape).numpy().astype("<i8").tobytes())
    digest.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The SHA-256, in hex, of the values of a tensor of any dtype, as they are in memory."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def inputs_sha256(batches: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """The SHA-256, in hex, of batches of a model's inputs: of each tensor's name, dtype, shape and values."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            described = f"{name} {batch[name].dtype} {list(batch[name].shape)} {tensor_sha256(batch[name])}\n"
            digest.update(described.encode())
    return digest.hexdigest()


def fingerprint_of_files(files: Iterable[Path]) -> dict[str, str]:
    """The size and a SHA-256 of each file, by its name. The hash covers the first MiB (which holds the header) and
    about 1024 samples of 4 KiB, spread evenly over the rest.

    A different checkpoint differs in the samples, even if only some matrices were fine-tuned. A hash of 100 GB would
    take longer than pruning a block.
    """
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


def fingerprint_of_model(folder: Path, weights: Iterable[Path] | None = None) -> dict[str, str]:
    """:func:`fingerprint_of_files` of a model's configuration, its own Python code and its weights; None: all files of
    weights in the folder."""
    parts = [folder / "config.json", *sorted(folder.glob("*.py"))]
    return fingerprint_of_files([*filter(Path.is_file, parts), *(weight_files(folder) if weights is None else weights)])


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a model's folder, sorted."""
    return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") and file.is_file())


def arithmetic() -> dict[str, Any]:
    """What changes how sums are rounded on a CPU: the number of threads and the kind of vector instructions."""
    return {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``"name was 1, now 2"`` for each name with two different values. Dots join the names of nested values.

    ``recorded`` was read from JSON. ``wanted`` is converted to JSON and back here, so that tuples and lists compare
    equal.
    """
    return _differences(recorded, json.loads(json.dumps(wanted)), "")


def _differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> list[str]:
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
