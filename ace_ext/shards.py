"""Safetensors files read and patched one tensor at a time, without mapping a file: what is read counts, and no more."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of those dtypes that a causal language model's checkpoint holds."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, dtype, shape, and its bytes' place in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shards:
    """The tensors of a model folder by name: one ``model.safetensors``, or several files and their index.

    Raises:
        InputError: there is none, a file of the index is missing, or a header is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _files(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(_read_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""
        entry = self._entry(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = memoryview(tensor.flatten().view(torch.uint8).numpy())
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise InputError(f"{entry.file} ends before its tensor {name}; fetch the file again")
                view = view[count:]
        return tensor

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors in place, and returns once they are on the disk.

        Raises:
            InputError: a name, dtype or shape that the files do not hold; nothing is written then.
        """
        for name, tensor in tensors.items():
            entry = self._entry(name)
            if entry.dtype != tensor.dtype or entry.shape != tuple(tensor.shape):
                raise InputError(
                    f"{name} must be {entry.dtype} {list(entry.shape)} as in {entry.file.name} "
                    f"(got {tensor.dtype} {list(tensor.shape)})"
                )
        for path in {self.entries[name].file for name in tensors}:
            with path.open("r+b") as file:
                for name, tensor in tensors.items():
                    if self.entries[name].file == path:
                        file.seek(self.entries[name].offset)
                        file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
                file.flush()
                os.fsync(file.fileno())

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"{self.folder} has no tensor {name}; save the model anew with save_pretrained")
        return self.entries[name]


def has_safetensors(folder: str | Path) -> bool:
    return (Path(folder) / SINGLE).is_file() or (Path(folder) / INDEX).is_file()


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder's safetensors, configuration, tokenizer and code; other formats of its weights stay."""
    target.mkdir(parents=True, exist_ok=True)
    weights = set(_files(source))
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors", ".onnx")
        if file.is_file() and (file in weights or not other_weights) and file.name != "pytorch_model.bin.index.json":
            shutil.copyfile(file, target / file.name)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"{str(folder)!r} has no {SINGLE} and no {INDEX}; save the model with save_pretrained")
        return [folder / SINGLE]
    try:
        names: Iterable[str] = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is no index of safetensors: {error!r}; fetch it again") from error
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{str(folder)!r} misses {', '.join(missing)} that its index names; fetch them again")
    return files


def _read_header(path: Path) -> dict[str, Entry]:
    """The format: 8 bytes of length, that many bytes of JSON, then the tensors' bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found = Entry(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if found.nbytes != end - begin or 8 + length + end > size:
                raise ValueError(f"{name} does not fit its place")
            entries[name] = found
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole safetensors file: {error}; fetch it again") from error
    return entries
