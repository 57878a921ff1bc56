"""Safetensors files read and patched one tensor at a time, without mapping a file: what is read counts, and no more."""

import json
import math
import os
import shutil
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.tensor_map import Stored, layout_of

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

    After :meth:`adopt` the parameters of a model can be asked for by their own names, however they are stored.

    Raises:
        InputError: there is none, a file of the index is missing, or a header is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _files(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(_read_header(file))
        self._layout: dict[str, Stored] = {}

    def adopt(self, model: nn.Module) -> "Shards":
        """Learns where the parameters of a model lie that the files hold under other names
        (:mod:`ace_ext.models.tensor_map`)."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, stored in layout_of(model, shapes).items():
            if len({self.entries[piece.name].dtype for piece in stored.pieces}) == 1:
                self._layout[name] = stored
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._layout

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        return next(iter(self.entries.values())).dtype

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's dtype and shape."""
        if name in self._layout:
            stored = self._layout[name]
            return self.entries[stored.pieces[0].name].dtype, stored.shape
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own."""
        dtype, shape = self.describe(name)
        tensor = torch.empty(shape, dtype=dtype)
        view = memoryview(tensor.flatten().view(torch.uint8).numpy())
        for path, offset, size in self._spans(name):
            part, view = view[:size], view[size:]
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while part:
                    count = file.readinto(part)
                    if not count:
                        raise InputError(f"{path} ends before its tensor {name}; fetch the file again")
                    part = part[count:]
        return tensor

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors in place, and returns once they are on the disk.

        Raises:
            InputError: a name, dtype or shape that the files do not hold; nothing is written then.
        """
        for name, tensor in tensors.items():
            dtype, shape = self.describe(name)
            if dtype != tensor.dtype or shape != tuple(tensor.shape):
                raise InputError(
                    f"{name} must be {dtype} {list(shape)} as in {self._spans(name)[0][0].name} "
                    f"(got {tensor.dtype} {list(tensor.shape)})"
                )
        files: dict[Path, BinaryIO] = {}
        with ExitStack() as opened:
            for name, tensor in tensors.items():
                view = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
                for path, offset, size in self._spans(name):
                    part, view = view[:size], view[size:]
                    if path not in files:
                        files[path] = opened.enter_context(path.open("r+b"))
                    files[path].seek(offset)
                    files[path].write(part)
        for path in files:
            flush(path)

    def _spans(self, name: str) -> list[tuple[Path, int, int]]:
        """A tensor's bytes, in order: file, place and number."""
        if name not in self._layout:
            entry = self._entry(name)
            return [(entry.file, entry.offset, entry.nbytes)]
        spans = []
        for piece in self._layout[name].pieces:
            entry = self.entries[piece.name]
            row = entry.dtype.itemsize * (entry.shape[-1] if len(entry.shape) > 1 else 1)
            spans.append((entry.file, entry.offset + piece.start * row, piece.rows * row))
        return spans

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise InputError(f"{self.folder} has no tensor {name}; save the model anew with save_pretrained")
        return self.entries[name]


def flush(path: Path) -> None:
    """Returns once the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def has_safetensors(folder: str | Path) -> bool:
    return (Path(folder) / SINGLE).is_file() or (Path(folder) / INDEX).is_file()


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder's safetensors, configuration, tokenizer and code; other formats of its weights stay."""
    target.mkdir(parents=True, exist_ok=True)
    weights = set(_files(source))
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors", ".onnx")
        other_index = file.name.endswith(".index.json") and (file.name != INDEX or source / SINGLE in weights)
        if file.is_file() and (file in weights or not other_weights) and not other_index:
            shutil.copyfile(file, target / file.name)


def _files(folder: Path) -> list[Path]:
    """The files that transformers would load: the single one goes first there too."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        raise InputError(f"{str(folder)!r} has no {SINGLE} and no {INDEX}; save the model with save_pretrained")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no index of safetensors: {error!r}; fetch it again") from error
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
            header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        return {name: _entry_of(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except InputError:
        raise
    except (struct.error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no whole safetensors file: {error!r}; fetch it again") from error


def _entry_of(path: Path, name: str, entry: dict, start: int, size: int) -> Entry:
    """One line of a header whose tensors begin at byte ``start`` of a file of ``size`` bytes."""
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{path} holds {name} as {entry['dtype']}; give a checkpoint that is not quantized")
    begin, end = entry["data_offsets"]
    found = Entry(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
    if begin < 0 or min(found.shape, default=0) < 0 or found.nbytes != end - begin or start + end > size:
        raise ValueError(f"{name} does not fit its place")
    return found
