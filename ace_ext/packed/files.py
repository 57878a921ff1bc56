"""The files of a packed folder: recognised, checked and read."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ace_ext.errors import InputError, existing_folder
from ace_ext.grids import Grid
from ace_ext.models.safetensors_files import Shards, read_entry
from ace_ext.models.safetensors_header import Entry, Header, parse_header, read_header
from ace_ext.ops import unpack_bitmap, unpack_quantized
from ace_ext.packed import CODECS, Codec
from ace_ext.packed._codec import CODES, Packed, Parts
from ace_ext.packed._writer import PADDING
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.quantized_matrix import QuantizedMatrix

SUFFIX = ".packed.safetensors"
"""The suffix of packed files, in place of ``.safetensors``, so that no program takes one for a dense file."""

VERSION, CODES_VERSION, TABLES_VERSION = "1", "2", "3"
"""The versions of files without codes, with codes, and with codes of a table outside the blocks. Older programs read
files that need no newer version."""

GROUP_END = 2**31
"""The group of a grid that a file names is smaller."""

KEY = "ace_packed"
"""The key of the metadata that holds, as JSON, the fields of :class:`Origin`."""


@dataclass(frozen=True)
class Origin:
    """The origin of a packed file: the dense files and the format."""

    version: str
    codec: str
    """The name of the packed format."""
    pattern: tuple[int, int] | None
    files: list[str]
    """The names of all dense files of the model."""
    header: str
    """The dense file's header, unchanged."""
    sha256: str
    """Of the whole dense file."""
    grid: Grid | None = None
    """The grid of the codes of matrices in blocks; None if the file has none."""
    tables: Mapping[str, Grid] = field(default_factory=dict)
    """The grids of the token embedding and the LM head, by the tensor's name, if they are codes."""

    def with_grids(self, grid: Grid | None, tables: Mapping[str, Grid]) -> "Origin":
        """The origin of the same file with codes on these grids, in the oldest version that can say so."""
        version = TABLES_VERSION if tables else VERSION if grid is None else CODES_VERSION
        return replace(self, version=version, grid=grid, tables=tables)

    def grid_of(self, name: str) -> Grid | None:
        """The grid of a tensor's codes, if it has any."""
        return self.tables.get(name, self.grid)

    def to_json(self) -> str:
        """The JSON text in the file's metadata."""
        fields = {name: value for name, value in vars(self).items() if name not in ("grid", "tables")}
        if self.grid is not None:
            fields["grid"] = vars(self.grid)
        if self.tables:
            fields["tables"] = {name: vars(grid) for name, grid in self.tables.items()}
        return json.dumps(fields)

    @classmethod
    def of(cls, path: Path, metadata: dict[str, str]) -> "Origin":
        """Reads it from a file's metadata.

        Raises:
            InputError: the file was not written by ``ace-prune pack``, or by a newer one.
        """
        if KEY not in metadata:
            raise InputError(f"{path} was not written by ace-prune pack; pack the model again")
        try:
            fields = dict(json.loads(metadata[KEY]))
            versions = (VERSION, CODES_VERSION, TABLES_VERSION)
            if fields["version"] not in versions or fields["codec"] not in CODECS:
                raise InputError(
                    f"{path} has version {fields['version']!r}, format {fields['codec']!r}; "
                    f"this program reads versions {VERSION} to {TABLES_VERSION}: {', '.join(CODECS)}"
                )
            pattern = fields["pattern"]
            if pattern is not None:
                pattern = (int(pattern[0]), int(pattern[1]))
                if not is_pattern(*pattern):
                    raise ValueError(f"pattern {pattern}")
            header, sha256 = fields["header"], fields["sha256"]
            if not all(isinstance(text, str) for text in (header, sha256, *fields["files"])):
                raise ValueError("header, sha256 and files must be texts")
            version, grid, tables = fields["version"], None, {}
            if version == TABLES_VERSION:
                tables = {str(name): _grid(each) for name, each in dict(fields["tables"]).items()}
            if version == CODES_VERSION or (tables and "grid" in fields):
                grid = _grid(fields["grid"])
            return cls(version, fields["codec"], pattern, list(fields["files"]), header, sha256, grid, tables)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} has damaged metadata: {error!r}; pack the model again") from error


def _grid(fields: Any) -> Grid:
    """The grid that a file names. Raises ValueError, KeyError or TypeError if it is none."""
    bits, group = fields["bits"], fields["group"]
    if type(bits) is not int or type(group) is not int or group >= GROUP_END:
        raise ValueError(f"grid {fields}")
    try:
        return Grid(bits, group)
    except InputError as error:
        raise ValueError(str(error)) from error


def dense(matrix: PackedMatrix | QuantizedMatrix) -> Tensor:
    """The dense matrix ``[rows, cols]``, with the bits of the weights."""
    if isinstance(matrix, QuantizedMatrix):
        tensors = matrix.bitmap, matrix.codes, matrix.scales
        return unpack_quantized(*tensors, matrix.bits, matrix.group, matrix.row_start, matrix.cols)
    dtype = matrix.values.dtype
    as_stored = torch.bfloat16 if dtype == torch.float16 else dtype  # the op converts float16, which changes some NaN
    return unpack_bitmap(matrix.bitmap, matrix.values.view(as_stored), matrix.row_start, matrix.cols).view(dtype)


def is_pattern(keep_n: int, group_m: int) -> bool:
    """Whether the formats hold this N:M; N = M is one without zeros."""
    return 1 <= keep_n <= group_m <= 32


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds files of ``ace-prune pack``."""
    return any(Path(folder).expanduser().glob(f"*{SUFFIX}"))


def packed_name(dense: str) -> str:
    """The name of the packed file of a dense one."""
    return dense.removesuffix(".safetensors") + SUFFIX


class PackedFile:
    """One packed file.

    Args:
        path: of the file.
        mapped: tensors are mapped from the file: pages are read at first use, and the system can drop them, but counts
            them as memory of the process. Else each tensor is read into its own memory.

    Raises:
        InputError: it is truncated, was not written by ace-prune, or its header is inconsistent.
    """

    def __init__(self, path: Path, mapped: bool = True) -> None:
        self.path = path
        header = read_header(path)
        self.origin = Origin.of(path, header.metadata)
        self.codec: Codec = CODECS[self.origin.codec]
        with self._damaged("dense header"):
            self.dense = self._dense_header()
        with self._damaged("header"):
            self._parts = self._divide(header)
        self._entries = header.entries
        self._file: Any = safe_open(path, framework="pt") if mapped else None

    @contextlib.contextmanager
    def _damaged(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            text = str(error) or repr(error)
            raise InputError(f"{self.path} is damaged ({what}: {text}); pack the model again") from error

    def _dense_header(self) -> Header:
        """The dense file's header; checks that its tensors are contiguous, without holes."""
        start = 8 + len(self.origin.header.encode("utf-8"))
        header = parse_header(self.origin.header, self.path, 2**62)
        end = start
        for entry in sorted(header.entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
            if entry.offset != end:
                raise ValueError(f"tensors overlap or leave holes at byte {end}")
            end += entry.nbytes
        return header

    def _divide(self, header: Header) -> dict[str, list[str]]:
        """The parts of every dense tensor; empty if it is stored unchanged. Every stored tensor must belong to one."""
        known = {name for name in header.entries if not name.startswith(PADDING)}
        found: dict[str, list[str]] = {}
        for name, dense in self.dense.entries.items():
            coded = f"{name}.{CODES}" in known
            if coded and self.origin.grid_of(name) is None:
                raise ValueError(f"{name} has codes, but the file names no grid for them")
            own = self.codec.quantized_parts if coded else self.codec.parts
            parts = [part for part in sorted(own) if f"{name}.{part}" in known]
            stored = header.entries.get(name)
            if stored is None and not parts:
                raise ValueError(f"{name} is missing")
            if stored is not None and (stored.dtype, stored.shape) != (dense.dtype, dense.shape):
                raise ValueError(f"{name} must be {dense.dtype} {list(dense.shape)}")
            found[name] = [] if stored is not None else parts
            known -= {name} if stored is not None else {f"{name}.{part}" for part in parts}
        if known:
            raise ValueError(f"{min(known)} belongs to no tensor")
        return found

    def coded(self) -> dict[str, int]:
        """The matrices of blocks that are stored as codes, each with the bytes of its parts."""
        return {
            name: sum(self._entries[f"{name}.{part}"].nbytes for part in parts)
            for name, parts in self._parts.items()
            if CODES in parts and name not in self.origin.tables
        }

    def load(self, name: str) -> PackedMatrix | QuantizedMatrix | Tensor:
        """A dense tensor by its name, as a matrix if it is packed.

        Raises:
            InputError: its parts are inconsistent.
        """
        with self._damaged(name):
            parts: Parts = {part: self._stored(f"{name}.{part}") for part in self._parts[name]}
            if not parts:
                return self._stored(name)
            entry, origin = self.dense.entries[name], self.origin
            return self.codec.decode(Packed(parts, entry.dtype, entry.shape, origin.pattern, origin.grid_of(name)))

    def _stored(self, name: str) -> Tensor:
        if self._file is None:
            return read_entry(self._entries[name], name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def tensor(self, name: str) -> Tensor:
        """A dense tensor by its name, unpacked."""
        found = self.load(name)
        return found if isinstance(found, Tensor) else dense(found).view(self.dense.entries[name].shape)


class PackedShards(Shards):
    """A packed folder, read like the dense folder that was packed; ``mapped`` as in :class:`PackedFile`.

    Raises:
        InputError: as :class:`PackedFile`, or a file is missing.
    """

    def __init__(self, folder: str | Path, mapped: bool = True) -> None:
        self.folder = existing_folder(folder)
        self.files = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not self.files:
            raise InputError(f"{str(folder)!r} holds no {SUFFIX[1:]} files; give a folder that ace-prune pack wrote")
        self.packed = [PackedFile(path, mapped) for path in self.files]
        self.entries: dict[str, Entry] = {}
        self._owner: dict[str, PackedFile] = {}
        for packed in self.packed:
            self.entries.update(packed.dense.entries)
            self._owner |= dict.fromkeys(packed.dense.entries, packed)
        self._check_complete()
        self._layout = {}

    def _check_complete(self) -> None:
        there = {path.name for path in self.files}
        for packed in self.packed:
            wanted = {packed_name(name) for name in packed.origin.files}
            if wanted != there:
                names = ", ".join(sorted(wanted ^ there))
                raise InputError(
                    f"{str(self.folder)!r} lacks these files, or should not have them: {names}; pack the model again"
                )

    def code_bits(self) -> tuple[Grid, float] | None:
        """The grid of the folder's codes, and the bits that a weight of these matrices takes; None without codes."""
        grid = next((packed.origin.grid for packed in self.packed if packed.origin.grid is not None), None)
        coded = {name: size for packed in self.packed for name, size in packed.coded().items()}
        if grid is None or not coded:
            return None
        return grid, 8 * sum(coded.values()) / sum(math.prod(self.entries[name].shape) for name in coded)

    def load(self, name: str) -> PackedMatrix | QuantizedMatrix | Tensor:
        """A stored tensor by its own name, as a matrix if it is packed."""
        self._entry(name)
        return self._owner[name].load(name)

    def read(self, name: str) -> Tensor:
        """The dense tensor, unpacked. A parameter that is stored in pieces is assembled."""
        if name not in self._layout:
            self._entry(name)
            return self._owner[name].tensor(name)
        stored = self._layout[name]
        rows = []
        for piece in stored.pieces:
            tensor = self._owner[piece.name].tensor(piece.name)
            matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.flatten()
            rows.append(matrix[piece.start : piece.start + piece.rows].flatten())
        found = torch.cat(rows)
        return found.view(stored.shape[::-1]).T if stored.transposed else found.view(stored.shape)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Refuses: a packed folder is not changed in place."""
        raise InputError(f"{str(self.folder)!r} is packed; unpack it first")
