"""Packs the files of a model folder, and unpacks them: ``ace-prune pack`` and ``ace-prune unpack``.

Both write to a temporary name, check the result against hashes of the dense files, and then rename it.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ace_ext.errors import InputError, existing_folder, path_of
from ace_ext.grids import Grid
from ace_ext.models.safetensors_files import Shards, bytes_of, copy_model, flush, umask
from ace_ext.models.safetensors_header import read_header
from ace_ext.packed import Codec, codec_named
from ace_ext.packed._codec import CODES
from ace_ext.packed._writer import StreamWriter, header_room
from ace_ext.packed.card_section import CARD, add_section, without_section
from ace_ext.packed.files import (
    KEY,
    SUFFIX,
    VERSION,
    Origin,
    PackedFile,
    PackedShards,
    is_packed,
    is_pattern,
    packed_name,
)
from ace_ext.packed.marking import CONFIG, mark, unmarked
from ace_ext.whole_files import sync_folder


@dataclass
class PackResult:
    """The result of :func:`pack`."""

    folder: str
    format: str
    matrices: int = 0
    """The number of tensors that became matrices without zeros."""
    quantized: int = 0
    """The number of those whose survivors are codes on a grid."""
    dense_bytes: int = 0
    """Bytes of the dense weight files; :attr:`packed_bytes` are those of the packed files."""
    packed_bytes: int = 0
    matrix_dense_bytes: int = 0
    """Bytes of the packed matrices alone, without embeddings, norms and biases."""
    matrix_packed_bytes: int = 0
    matrix_weights: int = 0
    """Weights of the packed matrices, zeros included."""
    tables: int = 0
    """The number of rounded tables outside the blocks that became codes: token embedding and LM head. The counts above
    do not include them."""

    @property
    def bits(self) -> float:
        """Bits that a weight of the packed matrices takes."""
        return 8 * self.matrix_packed_bytes / max(1, self.matrix_weights)


def count_matrix(result: PackResult, tensor: Tensor, packed_bytes: int, quantized: bool) -> None:
    """Adds a packed matrix to the counts of a result."""
    result.matrices += 1
    result.quantized += quantized
    result.matrix_dense_bytes += tensor.nbytes
    result.matrix_packed_bytes += packed_bytes
    result.matrix_weights += tensor.numel()


def pack(
    folder: str | Path,
    output: str | Path,
    codec: str,
    pattern: tuple[int, int] | None = None,
    grid: Grid | None = None,
    tables: Mapping[str, Grid] | None = None,
) -> PackResult:
    """Writes a packed copy of a model folder, and checks that it restores every byte of the dense files.

    Args:
        folder: a folder that ``save_pretrained`` or ``ace-prune run`` wrote. It is not changed.
        output: a folder that does not exist yet.
        codec: the name of a packed format, of :data:`ace_ext.packed.CODECS`.
        pattern: N and M, if the model was pruned to N:M.
        grid: the grid of the model's weights, if it was quantized. Matrices on it are stored as codes and scales.
        tables: the grids of the token embedding and the LM head, by the names of their tensors, if they were rounded.
            They are stored as codes too, except in the format ``nm``.

    Raises:
        InputError: the folder holds no safetensors or is packed already, the format needs a pattern, no matrix becomes
            smaller, or the output cannot be written.
    """
    chosen, source = codec_named(codec), existing_folder(folder)
    _check_form(pattern, grid, tables or {})
    if chosen.needs_pattern and pattern is None:
        raise InputError(
            f"format {codec} needs a model pruned with --pattern N:M, by its report; use bitmap or archive"
        )
    if is_packed(source):
        raise InputError(f"{str(folder)!r} is packed already; give the dense folder")
    with new_folder(output) as target:
        result = pack_into(source, target, chosen, pattern, grid, tables)
        add_section(target, PackedShards(target, mapped=False))
        if not result.matrices:
            raise InputError(_nothing_packed(str(folder), codec, pattern))
    result.folder = str(output)
    return result


def _nothing_packed(folder: str, codec: str, pattern: tuple[int, int] | None) -> str:
    """The error where no matrix became smaller."""
    if codec_named(codec).needs_pattern and pattern is not None:
        found = f"{pattern[0]}:{pattern[1]} along the rows of its tensor"
        return f"no matrix of {folder!r} has {found} (GPT-2's are stored transposed); use format bitmap"
    return f"no matrix of {folder!r} has enough zeros for format {codec}; prune it first"


def _is_pattern(value: object) -> bool:
    if not isinstance(value, tuple) or [type(number) for number in value] != [int, int]:
        return False
    return is_pattern(*value)


def _check_form(pattern: object, grid: object, tables: Mapping[str, object]) -> None:
    """Raises :class:`InputError` unless these are a pattern and grids, or None."""
    if pattern is not None and not _is_pattern(pattern):
        raise InputError(f"pattern must be two whole numbers N and M, as (2, 4) (got {str(pattern)[:100]!r})")
    for name, given in {"grid": grid, **{f"grid of {name}": table for name, table in tables.items()}}.items():
        if not isinstance(given, Grid | None):
            raise InputError(f"{name} must be an ace_ext.grids.Grid (got {type(given).__name__})")


def pack_into(
    folder: Path,
    target: Path,
    codec: Codec,
    pattern: tuple[int, int] | None,
    grid: Grid | None = None,
    tables: Mapping[str, Grid] | None = None,
) -> PackResult:
    """Packs a model folder into an empty folder, as :func:`pack` does; all files are synced when this returns.

    Raises:
        InputError: the folder holds no safetensors, or a written file does not restore its dense file.
    """
    shards = Shards(folder)
    result = PackResult(str(target), codec.name)
    copy_model(folder, target, weights=False)
    mark(target / CONFIG)
    for path in shards.files:
        names = [file.name for file in shards.files]
        origin = Origin(VERSION, codec.name, pattern, names, read_header(path).text, _file_sha256(path))
        origin = origin.with_grids(grid, tables or {})
        _pack_file(shards, path, target / packed_name(path.name), origin, result)
    for file in target.iterdir():
        flush(file)
    sync_folder(target)
    packed = PackedShards(target, mapped=False)  # a run's memory is limited
    check_hashes(packed)
    result.dense_bytes, result.packed_bytes = (
        sum(file.stat().st_size for file in files) for files in (shards.files, packed.files)
    )
    return result


def unpack(folder: str | Path, output: str | Path) -> int:
    """Restores the dense folder, byte for byte; returns the size of its weight files in bytes.

    Raises:
        InputError: the folder is damaged or was changed since it was packed, or the output cannot be written.
    """
    packed = PackedShards(folder, mapped=False)
    written = 0
    with new_folder(output) as target:
        for file in sorted(packed.folder.iterdir()):
            if file.is_file() and file.name == CONFIG:
                (target / CONFIG).write_bytes(unmarked(file))
            elif file.is_file() and file.name == CARD:
                (target / CARD).write_bytes(without_section(file))
            elif file.is_file() and file not in packed.files:
                shutil.copyfile(file, target / file.name)
        for one in packed.packed:
            path = target / (one.path.name.removesuffix(SUFFIX) + ".safetensors")
            with path.open("xb") as writing:
                _check_hash(one, writing.write)
            flush(path)
            written += path.stat().st_size
    return written


def check_hashes(packed: PackedShards) -> None:
    """Checks that a packed folder restores every byte of its dense files.

    Raises:
        InputError: a file does not; the message names the first.
    """
    for one in packed.packed:
        _check_hash(one, lambda _: None)


def _pack_file(shards: Shards, path: Path, target: Path, origin: Origin, result: PackResult) -> None:
    """Packs one dense file, and adds to the counts of ``result``."""
    header, codec = read_header(path), codec_named(origin.codec)
    before, coded = result.quantized, dict[str, Grid]()
    room = header_room(_metadata(origin), [*header.entries], codec.most_parts(origin.version != VERSION))
    with StreamWriter(target, room) as writer:
        for name in sorted(header.entries, key=lambda name: header.entries[name].offset):
            tensor = shards.read(name)
            parts = codec.encode(tensor, origin.pattern, origin.grid_of(name))
            for part, value in (parts or {}).items():
                writer.add(f"{name}.{part}", value)
            if parts is None:
                writer.add(name, tensor)
            elif name in origin.tables and CODES in parts:
                coded[name] = origin.tables[name]
            elif codec.removes_zeros(parts):
                count_matrix(result, tensor, sum(value.nbytes for value in parts.values()), CODES in parts)
        result.tables += len(coded)
        writer.finish(_metadata(origin.with_grids(origin.grid if result.quantized > before else None, coded)))


def _metadata(origin: Origin) -> dict[str, str]:
    return {"format": "pt", KEY: origin.to_json()}


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _dense_bytes(packed: PackedFile) -> Iterator[bytes | memoryview]:
    """The bytes of a packed file's dense file, in parts."""
    text = packed.dense.text.encode("utf-8")
    yield len(text).to_bytes(8, "little") + text
    entries = packed.dense.entries
    for name in sorted(entries, key=lambda name: (entries[name].offset, entries[name].nbytes)):
        if entries[name].nbytes:
            yield bytes_of(packed.tensor(name).contiguous())


def _check_hash(packed: PackedFile, write: Callable[[bytes | memoryview], object]) -> None:
    """Passes the dense file's bytes to ``write``, and compares their hash at the end."""
    digest = hashlib.sha256()
    for part in _dense_bytes(packed):
        digest.update(part)
        write(part)
    if digest.hexdigest() != packed.origin.sha256:
        raise InputError(
            f"{packed.path} does not restore the file that was packed; fetch it again, or pack the model again"
        )


@contextlib.contextmanager
def _locked_folder(folder: Path, output: str | Path) -> Iterator[None]:
    """Creates a folder, or takes over one that a killed process left. Locks it for this process.

    Raises:
        InputError: another process has it, or it is a link or has content that ace-prune does not leave.
    """
    if folder.is_symlink() or (folder.exists() and not all(map(_is_plain_file, folder.iterdir()))):
        raise InputError(f"{str(folder)!r} is in the way: ace-prune did not make it; move it away")
    folder.mkdir(mode=0o700, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"output {str(output)!r} is being written by another process; wait for it") from error
    finally:
        os.close(number)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


@contextlib.contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A folder with a temporary name beside ``output``. It is renamed once complete, or removed after an error.

    Raises:
        InputError: ``output`` exists, or cannot be written.
    """
    path = path_of("output", output)
    if path.exists():
        raise InputError(f"output {str(output)!r} exists; give another name")
    target = path.with_name(f".{path.name}.packing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(target, output):
            try:
                for left in target.iterdir():  # by a killed process
                    left.unlink()
                yield target
                for file in target.iterdir():
                    flush(file)
                sync_folder(target)
                target.chmod(0o777 & ~umask())
                target.rename(path)
                sync_folder(path.parent)
            finally:
                shutil.rmtree(target, ignore_errors=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(f"output {str(output)!r} cannot be written: {os.strerror(error.errno)}") from error
