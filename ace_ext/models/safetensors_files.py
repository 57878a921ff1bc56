"""The safetensors files of a model folder, read and patched in place one tensor at a time.

Tensors are read without mapping a file: the pages of a mapped file would count as the process's memory.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError, existing_folder
from ace_ext.models.safetensors_header import Entry, read_header
from ace_ext.models.tensor_map import Stored, layout_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The tensors of a model folder by name: one ``model.safetensors``, or several files and their index.

    After :meth:`adopt` the parameters of a model can be asked for by their own names, however they are stored.

    Raises:
        InputError: there is none, a file of the index is missing, or a header is damaged.
    """

    decodes: str | None = None
    """The ``quant_method`` of the configurations whose weights a class of shards reads as dense ones."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _files(self.folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries.update(read_header(file).entries)
        self._layout: dict[str, Stored] = {}

    def adopt(self, model: nn.Module) -> "Shards":
        """Finds the tensors of those parameters and buffers of a model that the files hold under other names
        (:mod:`ace_ext.models.tensor_map`)."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, stored in layout_of(model, shapes).items():
            if len({self.entries[piece.name].dtype for piece in stored.pieces}) == 1:
                self._layout[name] = stored
        return self

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._layout

    def stored_name(self, names: Iterable[str]) -> str | None:
        """The first of a parameter's names that the files have; None if they have none."""
        return next((name for name in names if name in self), None)

    def whole_name(self, name: str) -> str | None:
        """The stored tensor that a parameter is, as it stands; None if there is none, or if the parameter is made of
        parts."""
        if name in self.entries:
            return name
        stored = self._layout.get(name)
        if stored is None or stored.transposed or len(stored.pieces) != 1:
            return None
        only = stored.pieces[0].name
        return only if tuple(self.entries[only].shape) == tuple(stored.shape) else None

    def unread(self, model: nn.Module) -> list[str]:
        """The names of stored tensors that no parameter or buffer of an adopted model is read from, sorted."""
        own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        pieces = {piece.name for stored in self._layout.values() for piece in stored.pieces}
        return sorted(self.entries.keys() - {name for name, _ in own} - pieces)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor of floats, as transformers finds it: position ids may stand before it."""
        found = [entry.dtype for entry in self.entries.values()]
        return next((dtype for dtype in found if dtype.is_floating_point), found[0])

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
        turned = name in self._layout and self._layout[name].transposed
        tensor = torch.empty(shape[::-1] if turned else shape, dtype=dtype)
        view = bytes_of(tensor)
        for path, offset, size in self.spans(name):
            part, view = view[:size], view[size:]
            _read_into(part, path, offset, name)
        return tensor.T if turned else tensor

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors in place, and returns once they are on the disk.

        Raises:
            InputError: a name, dtype or shape does not match the files; nothing is written then.
        """
        for name, tensor in tensors.items():
            dtype, shape = self.describe(name)
            if dtype != tensor.dtype or shape != tuple(tensor.shape):
                raise InputError(
                    f"{name} must be {dtype} {list(shape)} as in {self.spans(name)[0][0].name} "
                    f"(got {tensor.dtype} {list(tensor.shape)})"
                )
        files: dict[Path, BinaryIO] = {}
        with ExitStack() as opened:
            for name, tensor in tensors.items():
                turned = name in self._layout and self._layout[name].transposed
                view = bytes_of((tensor.T if turned else tensor).detach().cpu().contiguous())
                for path, offset, size in self.spans(name):
                    part, view = view[:size], view[size:]
                    if path not in files:
                        files[path] = opened.enter_context(path.open("r+b"))
                    files[path].seek(offset)
                    files[path].write(part)
        for path in files:
            flush(path)

    def spans(self, name: str) -> list[tuple[Path, int, int]]:
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
            raise InputError(f"{self.folder} has no tensor {name}; save it again with save_pretrained")
        return self.entries[name]


def read_entry(entry: Entry, name: str) -> Tensor:
    """One tensor of a file, in memory of its own.

    Raises:
        InputError: the file was cut after its header was read.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    _read_into(bytes_of(tensor), entry.file, entry.offset, name)
    return tensor


def _read_into(part: memoryview, path: Path, offset: int, name: str) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while part:
            count = file.readinto(part)
            if not count:
                raise InputError(f"{path} ends before its tensor {name}; fetch the file again")
            part = part[count:]


def all_names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter of a model, by the parameter's id; several if it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes that can be written to."""
    return tensor.flatten().view(torch.uint8).numpy().data


def flush(path: Path) -> None:
    """Returns when the file's contents are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def has_safetensors(folder: str | Path) -> bool:
    """Whether a model folder has weights in safetensors files."""
    return (Path(folder) / SINGLE).is_file() or (Path(folder) / INDEX).is_file()


def copy_model(source: Path, target: Path, weights: bool = True) -> None:
    """Copies a model folder's configuration, tokenizer and code, and its safetensors unless ``weights`` is False, but
    not its weights in other formats."""
    target.mkdir(parents=True, exist_ok=True)
    files = set(_files(source))
    for file in sorted(source.iterdir()):
        other_weights = file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors", ".onnx")
        other_index = file.name.endswith(".index.json") and (file.name != INDEX or source / SINGLE in files)
        if file.is_file() and ((file in files and weights) or not other_weights) and not other_index:
            if file not in files:
                _check_link(file)
            shutil.copyfile(file, target / file.name)


def copy_notices(source: Path | None, target: Path) -> None:
    """Copies a model folder's card and licence. ``save_pretrained`` does not write them."""
    for file in sorted(source.iterdir()) if source is not None else ():
        if file.is_file() and (file.name == "README.md" or file.name.startswith(("LICENSE", "NOTICE"))):
            _check_link(file)
            shutil.copyfile(file, target / file.name)


def _check_link(file: Path) -> None:
    """Refuses a link out of the model's folder: its target would be copied into the output, and the output may be
    published. Links into ``blobs`` are allowed: the folders of a hub's cache consist of them. Links to weights may lead
    anywhere: these files are checked to be weights.

    Raises:
        InputError: naming it.
    """
    if not file.is_symlink():
        return
    target, folder = file.resolve(), file.parent.resolve()
    if target.parent not in (folder, folder.parent.parent / "blobs"):
        raise InputError(
            f"{str(file)!r} is a link to {str(target)!r}, outside the model's folder, and would be copied into the "
            "output; put the file itself there, or remove the link"
        )


def _files(folder: Path) -> list[Path]:
    """The files that transformers would load. As there, the single file takes precedence over an index."""
    index = existing_folder(folder) / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        raise InputError(f"{str(folder)!r} has no {SINGLE} and no {INDEX}; save the model with save_pretrained")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            _check_name(name)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not a safetensors index: {error!r}; fetch it again") from error
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{str(folder)!r} lacks {', '.join(missing)}, which its index names; fetch it again")
    return files


def _check_name(name: str) -> None:
    """Raises ValueError for a name in an index that leads out of the model's folder, or does not end in
    ``.safetensors``. The named file is copied, and its copy is patched."""
    if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise ValueError(f"{name[:200]!r} is not the name of a .safetensors file in the same folder")


def umask() -> int:
    """The process's mask of permissions of new files. It can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
