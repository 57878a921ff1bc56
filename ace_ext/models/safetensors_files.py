"""The safetensors files of a model folder, read and patched in place one tensor at a time.

The header is parsed here and not by the library, which does not tell the byte offsets that patching in place needs.
Each file is first opened by the library, so that what it refuses is refused here too. Tensors are read without mapping
a file: the pages of a mapped file would count as the process's memory.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.tensor_map import Stored, layout_of

STORED_DTYPES = {
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
"""The dtypes that a checkpoint may hold, by their names in the format. Others are those of quantized weights."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its bytes begin at ``offset`` of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in the file."""
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
        """Finds the tensors of those parameters of a model that the files hold under other names
        (:mod:`ace_ext.models.tensor_map`)."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, stored in layout_of(model, shapes).items():
            if len({self.entries[piece.name].dtype for piece in stored.pieces}) == 1:
                self._layout[name] = stored
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._layout

    def unread(self, model: nn.Module) -> list[str]:
        """The names of stored tensors that no parameter or buffer of an adopted model is read from, sorted."""
        own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        pieces = {piece.name for stored in self._layout.values() for piece in stored.pieces}
        return sorted(self.entries.keys() - {name for name, _ in own} - pieces)

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
        """The tensor, on the CPU, in memory of its own.

        Raises:
            InputError: no file holds it, or its file was cut after it was opened.
        """
        dtype, shape = self.describe(name)
        tensor = torch.empty(shape, dtype=dtype)
        view = _bytes_of(tensor)
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
                view = _bytes_of(tensor.detach().cpu().contiguous())
                for path, offset, size in self._spans(name):
                    part, view = view[:size], view[size:]
                    if path not in files:
                        files[path] = opened.enter_context(path.open("r+b"))
                    files[path].seek(offset)
                    files[path].write(part)
        for path in files:
            flush(path)

    def _spans(self, name: str) -> list[tuple[Path, int, int]]:
        """The parts of the files that hold a tensor's bytes, in order: file, offset and size in bytes."""
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


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes that can be written to."""
    return tensor.flatten().view(torch.uint8).numpy().data


def flush(path: Path) -> None:
    """Returns when the file's contents are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def has_safetensors(folder: str | Path) -> bool:
    """Whether a model folder has weights in safetensors files."""
    return (Path(folder) / SINGLE).is_file() or (Path(folder) / INDEX).is_file()


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder's safetensors, configuration, tokenizer and code, but not its weights in other formats."""
    target.mkdir(parents=True, exist_ok=True)
    weights = set(_files(source))
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors", ".onnx")
        other_index = file.name.endswith(".index.json") and (file.name != INDEX or source / SINGLE in weights)
        if file.is_file() and (file in weights or not other_weights) and not other_index:
            shutil.copyfile(file, target / file.name)


def _files(folder: Path) -> list[Path]:
    """The files that transformers would load: like there, the single file wins over an index."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        raise InputError(f"{str(folder)!r} has no {SINGLE} and no {INDEX}; save the model with save_pretrained")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            _check_name(name)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is no index of safetensors: {error!r}; fetch it again") from error
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{str(folder)!r} misses {', '.join(missing)} that its index names; fetch them again")
    return files


def _check_name(name: str) -> None:
    """Raises ValueError for a name in an index that leads out of the model's folder, or is none of safetensors: what it
    names is copied, and patched in the copy."""
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise ValueError(f"{name[:200]!r} is no name of a .safetensors file in the same folder")


def _read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name. The format: 8 bytes of length, that many bytes of JSON, then the tensors' bytes.

    Raises:
        InputError: the library refuses the file (damaged, cut, bytes that no tensor owns, tensors that overlap, a name
            twice), or a tensor's dtype is not in :data:`STORED_DTYPES`.
    """
    size = path.stat().st_size
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = dict(json.loads(file.read(length)))
        header.pop("__metadata__", None)
        return {name: _entry_of(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except InputError:
        raise
    except (SafetensorError, struct.error, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise InputError(f"{path} is no whole safetensors file: {error!r}; fetch it again") from error


def _entry_of(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> Entry:
    """One entry of a header whose tensors begin at byte ``start`` of a file of ``size`` bytes."""
    if entry["dtype"] not in STORED_DTYPES:
        raise InputError(f"{path} holds {name} as {entry['dtype']}; give a checkpoint that is not quantized")
    begin, end = entry["data_offsets"]
    found = Entry(path, STORED_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
    if begin < 0 or min(found.shape, default=0) < 0 or found.nbytes != end - begin or start + end > size:
        raise ValueError(f"the offsets of {name} do not fit its shape")
    return found
