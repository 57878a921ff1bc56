"""The form ``pack-quantized`` of the library compressed-tensors, which transformers and vLLM load without this program.

``W.weight_packed`` int32 ``[rows, cols bits / 32]`` holds ``q + 2^(bits-1)`` of each code, the lowest bits first,
``W.weight_scale [rows, cols / group]`` the scales, and ``W.weight_shape`` int64 the shape; weights are codes times
scales. Zeros are code 0. Source of the layout: ``compressed_tensors/compressors/pack_quantized`` of compressed-tensors
0.20. The other form of integers, ``int-quantized``, is for quantized inputs: vLLM 0.32 loads no other with it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.grids import Grid, product
from ace_ext.models._transformers import COMPRESSED_METHOD, predicts_tokens
from ace_ext.models.safetensors_files import INDEX, Shards, copy_model, flush, read_entry
from ace_ext.models.safetensors_header import Entry, read_header
from ace_ext.models.skeleton import skeleton
from ace_ext.packed._codec import Kept
from ace_ext.packed._writer import StreamWriter, header_room
from ace_ext.packed.card_section import add_section_text
from ace_ext.packed.files import is_packed
from ace_ext.packed.marking import CONFIG
from ace_ext.packed.matrix import BITS
from ace_ext.packed.packing import PackResult, count_matrix, new_folder
from ace_ext.packed.quantized_matrix import code_width, recover
from ace_ext.whole_files import sync_folder, write_whole

NAME = COMPRESSED_METHOD
"""The name of the format, and the ``quant_method`` of its configuration."""

SUMMARY = "of a quantized model: codes and scales as vLLM and transformers load them, zeros stored"

FORM = "pack-quantized"

LEAST_GROUP = 8
"""The fewest columns that share a scale: 4-bit codes of so many fill a word of int32."""

_SECTION = """
## Quantized

The weights of the Linears are codes of {num_bits} bits in the form `{form}` of `compressed-tensors`; {group_size}
columns of a row share a scale. A weight of these matrices takes {bits:.2f} bits; zeros are stored. vLLM loads the
folder, and so does transformers with the package `compressed-tensors`.
"""

_PACKED, _SCALE, _SHAPE = "weight_packed", "weight_scale", "weight_shape"


@dataclass(frozen=True)
class Form:
    """How the matrices of a model are stored."""

    grid: Grid
    """The grid of the weights."""
    group: int
    """Columns that share a stored scale: they divide the columns of every matrix."""
    modules: frozenset[str]
    """The Linears that are stored as codes."""
    dense: list[str]
    """The other Linears, which stay dense."""

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return code_width(self.grid)

    def configuration(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": NAME,
            "format": FORM,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": self.dense,
        }

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """``weight_packed`` and ``weight_scale`` of a matrix; None if it is not on the grid."""
        recovered = recover(weight, self.grid)
        if recovered is None:
            return None
        codes, scales = recovered
        wide = scales.repeat_interleave(self.grid.group // self.group, dim=1)[:, : weight.shape[1] // self.group]
        unsigned = (codes.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        if self.bits == 4:
            unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
        return unsigned.contiguous().view(torch.int32), wide.contiguous()


def size(kept: Kept) -> int:
    """The bytes of codes, scales and shape of a matrix; more if other matrices need smaller groups."""
    assert kept.grid is not None  # checked before a run
    groups = kept.cols // math.gcd(kept.grid.group, kept.cols)
    codes = kept.rows * 4 * math.ceil(kept.cols * code_width(kept.grid) / 32)
    return codes + kept.rows * groups * kept.dtype.itemsize + 16


def check_linears(model: nn.Module, names: Iterable[str], shards: Shards | None = None) -> None:
    """Checks that these matrices are Linears of a model, with a weight of their own in its files if these are given.

    Raises:
        InputError: one is not, and this form cannot store it; or the model is no causal language model: transformers
            loads some others from this form (BERT, Whisper) and some not (T5, ModernBERT, SigLIP).
    """
    if not predicts_tokens(model):
        raise InputError(
            f"format {NAME} is for causal language models (got {type(model).__name__}); use format bitmap or archive"
        )
    modules = dict(model.named_modules())
    for name in names:
        in_files = shards is None or f"{name}.weight" in shards.entries
        if not isinstance(modules.get(name), nn.Linear) or not in_files:
            raise InputError(
                f"format {NAME} stores the weights of Linears, and {name} is not one in the files (fused experts, or a "
                "transposed matrix); use format bitmap"
            )


def common_group(grid: Grid, columns: Iterable[int]) -> int:
    """The width of groups that divides the grid's groups and the columns of all matrices.

    Raises:
        InputError: it is too small.
    """
    group = math.gcd(grid.group, *columns)
    if group < LEAST_GROUP:
        raise InputError(
            f"format {NAME} needs matrices whose columns are multiples of {LEAST_GROUP} (got groups of {group}); use "
            "format bitmap"
        )
    return group


def form_of(model: nn.Module, shards: Shards, grid: Grid, names: Iterable[str]) -> Form:
    """How a model is stored whose matrices of these names are on a grid.

    Raises:
        InputError: as :func:`check_linears`, or scales cannot be divided among the columns of a matrix.
    """
    modules = frozenset(names)
    check_linears(model, sorted(modules), shards)
    group = common_group(grid, (shards.entries[f"{name}.weight"].shape[1] for name in modules))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Form(grid, group, modules, [name for name in linears if name not in modules])


def compress_into(folder: Path, target: Path, grid: Grid, names: Iterable[str]) -> PackResult:
    """Writes a quantized model folder into an empty folder in this form, and checks that it gives the same weights; all
    files are synced when this returns.

    Args:
        folder: the dense folder.
        target: the empty folder.
        grid: the grid of the model.
        names: the matrices on the grid, by the names of their modules.

    Raises:
        InputError: as :func:`form_of`, or a matrix is not on the grid.
    """
    shards = Shards(folder)
    form = form_of(skeleton(folder, shards, causal=False), shards, grid, names)
    result = PackResult(str(target), NAME)
    copy_model(folder, target, weights=False)
    _configure(target / CONFIG, form)
    index: dict[str, str] = {}
    for path in shards.files:
        for name in _write_file(shards, path, target / path.name, form, result):
            index[name] = path.name
    if (target / INDEX).is_file():
        sizes = sum(entry.nbytes for path in shards.files for entry in read_header(target / path.name).entries.values())
        text = json.dumps({"metadata": {"total_size": sizes}, "weight_map": dict(sorted(index.items()))}, indent=2)
        write_whole(target / INDEX, (text + "\n").encode())
    for file in target.iterdir():
        flush(file)
    sync_folder(target)
    _check(shards, CompressedShards(target))
    result.dense_bytes, result.packed_bytes = (
        sum((place / path.name).stat().st_size for path in shards.files) for place in (folder, target)
    )
    return result


def compress(folder: str | Path, output: str | Path, grid: Grid | None, names: Iterable[str]) -> PackResult:
    """Writes a copy of a quantized model folder in this form, as :func:`ace_ext.packed.packing.pack` writes one.

    Args:
        folder: the dense folder. It is not changed.
        output: a folder that does not exist yet.
        grid: the grid of the model; None if its report names none.
        names: the matrices on the grid, by the names of their modules.

    Raises:
        InputError: as :func:`compress_into`, the model is not quantized, or the output cannot be written.
    """
    if grid is None:
        raise InputError(
            f"format {NAME} needs a model quantized by the stage quantize, by its report; use bitmap or archive"
        )
    if is_packed(folder):
        raise InputError(f"{str(folder)!r} is packed; give the dense folder")
    with new_folder(output) as target:
        result = compress_into(Path(folder).expanduser(), target, grid, names)
        add_section_text(target, compressed_section(target))
    result.folder = str(output)
    return result


def compressed_section(folder: Path) -> bytes:
    """The section of the card of a folder of this form."""
    scheme = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]["config_groups"][
        "group_0"
    ]
    stored = CompressedShards(folder)
    bits = 8 * stored.code_bytes / sum(math.prod(stored.entries[name].shape) for name in stored.coded)
    return _SECTION.format(form=FORM, bits=bits, **scheme["weights"]).encode("utf-8")


def is_compressed(folder: str | Path) -> bool:
    """Whether a folder holds weights of this form, by its configuration: all Linears but those of ``ignore`` have
    symmetric codes with a scale for each row and group of columns."""
    path = Path(folder).expanduser() / CONFIG
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        (scheme,) = found["config_groups"].values()
        weights = scheme["weights"]
        return (
            (found["quant_method"], found["format"]) == (NAME, FORM)
            and (weights["type"], weights["strategy"], weights["symmetric"]) == ("int", "group", True)
            and weights["num_bits"] in (4, 8)
            and not weights.get("actorder")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


class CompressedShards(Shards):
    """The files of a folder of this form, read like those of the dense folder.

    Raises:
        InputError: as :class:`ace_ext.models.safetensors_files.Shards`, or the codes of a matrix are damaged.
    """

    decodes = NAME

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._stored: dict[str, tuple[Entry, Entry]] = {}
        for name in [name for name in self.entries if name.endswith(f".{_PACKED}")]:
            module = name.removesuffix(f".{_PACKED}")
            packed, scale, shape = (self.entries.pop(f"{module}.{part}", None) for part in (_PACKED, _SCALE, _SHAPE))
            if packed is None or scale is None or shape is None:
                raise InputError(f"{str(folder)!r} lacks {_SCALE} or {_SHAPE} of {module}; write it again")
            dense = tuple(read_entry(shape, f"{module}.{_SHAPE}").tolist())
            self.entries[f"{module}.weight"] = Entry(packed.file, scale.dtype, dense, packed.offset)
            self._stored[f"{module}.weight"] = packed, scale

    @property
    def coded(self) -> list[str]:
        """The tensors that are stored as codes."""
        return list(self._stored)

    @property
    def code_bytes(self) -> int:
        """The bytes of their codes and scales."""
        return sum(entry.nbytes for pair in self._stored.values() for entry in pair)

    def read(self, name: str) -> Tensor:
        """The dense tensor."""
        if name not in self._stored:
            return super().read(name)
        packed, scale = self._stored[name]
        rows, cols = self.entries[name].shape
        bits, group = 32 * packed.shape[1] // cols, cols // scale.shape[1]
        raw = read_entry(packed, name).view(torch.uint8)
        if bits == 4:
            raw = torch.stack((raw & 15, raw >> 4), dim=2).view(rows, cols)
        codes = raw.to(torch.int16) - (1 << (bits - 1))
        return product(read_entry(scale, name).repeat_interleave(group, dim=1), codes)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Refuses: such a folder is not changed in place."""
        raise InputError(f"{str(self.folder)!r} holds {NAME} weights, which are not changed in place")


def _configure(path: Path, form: Form) -> None:
    """Adds the ``quantization_config`` to a configuration."""
    found = json.loads(path.read_text(encoding="utf-8"))
    write_whole(path, (json.dumps(found | {"quantization_config": form.configuration()}, indent=2) + "\n").encode())


def _write_file(shards: Shards, path: Path, target: Path, form: Form, result: PackResult) -> list[str]:
    """Writes the tensors of one dense file; returns their names, and adds to the counts of ``result``.

    Larger numbers come first, as safetensors writes them: then each tensor begins at a multiple of its number's size.
    """
    header = read_header(path)
    tensors = _Tensors(shards, form, result)
    planned = [item for name, entry in header.entries.items() for item in tensors.planned(name, entry)]
    metadata = {"format": "pt"}
    with StreamWriter(target, header_room(metadata, [name for _, name, _ in planned], 1), alignment=1) as writer:
        for _, name, read in sorted(planned, key=lambda item: -item[0]):
            writer.add(name, read())
        writer.finish(metadata)
    return [name for _, name, _ in planned]


class _Tensors:
    """The tensors to write, made when they are written. Scales wait in memory until their turn."""

    def __init__(self, shards: Shards, form: Form, result: PackResult) -> None:
        self._shards, self._form, self._result = shards, form, result
        self._scales: dict[str, Tensor] = {}

    def planned(self, name: str, entry: Entry) -> Iterator[tuple[int, str, Callable[[], Tensor]]]:
        """Size of a number, name, and how to make it, of each tensor that is stored for a dense one."""
        module = name.removesuffix(".weight")
        if module not in self._form.modules or not name.endswith(".weight"):
            yield entry.dtype.itemsize, name, lambda: self._shards.read(name)
            return
        if entry.dtype not in BITS or len(entry.shape) != 2:
            raise InputError(f"{name} must be a matrix of float32, float16 or bfloat16 to be stored as {NAME}")
        yield 8, f"{module}.{_SHAPE}", lambda: torch.tensor(entry.shape)
        yield 4, f"{module}.{_PACKED}", lambda: self._codes(name)
        yield entry.dtype.itemsize, f"{module}.{_SCALE}", lambda: self._scales.pop(name)

    def _codes(self, name: str) -> Tensor:
        weight = self._shards.read(name)
        found = self._form.encode(weight)
        if found is None:
            grid = self._form.grid
            raise InputError(
                f"{name} is not on a grid of {grid.bits} bits with groups of {grid.group} columns, as the report says: "
                "it was changed since; quantize again, or use format bitmap"
            )
        codes, self._scales[name] = found
        count_matrix(self._result, weight, codes.nbytes + self._scales[name].nbytes, True)
        return codes


def _check(dense: Shards, compressed: CompressedShards) -> None:
    """Checks that each tensor has the same bits in both."""
    for name in dense.entries:
        one, two = dense.read(name), compressed.read(name)
        if one.dtype != two.dtype or not torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8)):
            raise InputError(f"{name} was not written as it is; the disk may be damaged: write it again")
