"""Matrices on a grid: codes and scales restore every bit, sizes are as planned, and damaged parts are refused."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from folders import prune, save_dense
from helpers import DTYPES, assert_same_bits, make_weight, rest_nightly
from hypothesis import given, settings
from hypothesis import strategies as st
from packed.test_packing import files_of, half, refused
from quantized_folders import on_grid, quantize_folder
from safetensors.torch import save_file

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.grids import Grid
from ace_ext.ops import packed_reference as reference
from ace_ext.packed import CODECS, codec_named
from ace_ext.packed._codec import Kept, Packed
from ace_ext.packed.files import KEY, SUFFIX, PackedShards
from ace_ext.packed.matrix import PackedMatrix, pack_bits
from ace_ext.packed.packing import check_hashes, pack, unpack
from ace_ext.packed.quantized_matrix import QuantizedMatrix, code_width, pack_codes
from ace_ext.records import REPORT_NAME

SHAPES = ((1, 1), (2, 1), (1, 64), (3, 65), (31, 33), (5, 129), (2, 1134))
GRIDS = (Grid(8, 64), Grid(4, 128), Grid(3, 64))


def bits_of(grid: Grid) -> str:
    """The name of a grid in that of a test."""
    return f"{grid.bits}bit"


grids = pytest.mark.parametrize("grid", GRIDS, ids=bits_of)
four_bits = pytest.mark.parametrize("quantized", rest_nightly([Grid(4, 128)], GRIDS), ids=bits_of, indirect=True)
"""The other grids at night."""


def unpacked(matrix: QuantizedMatrix) -> torch.Tensor:
    """The dense matrix by the reference of the op."""
    return reference.unpack_quantized(
        matrix.bitmap, matrix.codes, matrix.scales, matrix.bits, matrix.group, matrix.row_start, matrix.cols
    )


# The matrix


@grids
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_comes_back_bit_for_bit(shape, grid, dtype, random):
    ragged = make_weight(*shape, dtype, random) * (torch.rand(shape, generator=random) < torch.rand(shape[0], 1))
    for weight in (half(*shape, dtype, random), ragged, make_weight(*shape, dtype, random), torch.zeros(shape)):
        weight = on_grid(weight.to(dtype), grid)
        matrix = QuantizedMatrix.of(weight, grid).check()
        assert matrix.shape == shape
        assert matrix.dtype == dtype
        assert_same_bits(matrix.dense(), weight)
        assert_same_bits(unpacked(matrix), weight)


def test_short_rows_are_filled_or_have_their_own_starts():
    grid = Grid(4, 64)
    weight = torch.where(torch.arange(128) % 2 == 0, on_grid(torch.ones(8, 128).bfloat16(), grid), 0)
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert matrix.row_start is None
    assert tuple(matrix.codes.shape) == (8, 32)
    weight[3, :6] = 0  # three codes fewer: filling takes two bytes, starts would take 72
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert matrix.row_start is None
    assert_same_bits(matrix.dense(), weight)
    weight[:4] = 0
    weight[5, 0] = 0  # an odd number
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert matrix.row_start.tolist() == [0, 0, 0, 0, 0, 32, 64, 96, 128]
    assert matrix.codes[63] >> 4 == 0
    assert_same_bits(matrix.dense(), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.0, 0.3])
def test_only_what_is_on_the_grid_is_packed(bad, dtype, random):
    """A value that is not finite, -0.0 and a value between codes, also in a row after those that are tried first."""
    grid = Grid(4, 64)
    weight = on_grid(make_weight(12, 64, dtype, random), grid)
    assert QuantizedMatrix.of(weight, grid) is not None
    for row in (0, 11):
        other = weight.clone()
        other[row, 3] = bad if bad != 0.3 else other[row].abs().max() * 0.9
        assert QuantizedMatrix.of(other, grid) is None


def test_a_group_that_is_wider_than_the_matrix_takes_no_memory(random):
    """The padding of a group of 2^30 columns would take gigabytes a row."""
    grid = Grid(4, 2**30)
    weight = on_grid(make_weight(3, 100, torch.float32, random), Grid(4, 128))
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert matrix.group == 2**30
    assert_same_bits(matrix.dense(), weight)


def test_another_dtype_changes_scales(random):
    weight = on_grid(half(4, 128, torch.bfloat16, random), GRIDS[0])
    matrix = QuantizedMatrix.of(weight, GRIDS[0])
    assert matrix.to(torch.bfloat16) is matrix
    wide = matrix.to(torch.float32)
    assert wide.codes is matrix.codes
    assert_same_bits(wide.dense().bfloat16(), weight)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_codes_and_scales_come_back(data):
    """Rows of any number of survivors, any scales of the dtype, subnormal ones included."""
    dtype, bits = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((8, 4, 3)))
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 200))
    grid = Grid(bits, data.draw(st.sampled_from((64, 128))))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    codes = torch.randint(grid.lowest, grid.highest + 1, (rows, cols), generator=random, dtype=torch.int8)
    codes *= torch.rand(rows, cols, generator=random) < torch.rand(rows, 1, generator=random)
    exponent = torch.randint(-18, 4, (rows, grid.groups(cols)), generator=random)
    scales = torch.rand(rows, grid.groups(cols), generator=random).add(0.5).ldexp(exponent).to(dtype)
    weight = grid.dequantize(codes, scales)
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert_same_bits(matrix.dense(), weight)
    assert_same_bits(unpacked(matrix), weight)
    given_codes = QuantizedMatrix(
        pack_bits(torch.ones(rows, cols, dtype=torch.bool)),
        pack_codes(codes, code_width(grid)),
        scales,
        None,
        code_width(grid),
        grid.group,
        cols,
    )
    assert torch.equal(given_codes.check().dense_codes(), codes)


def damages(matrix: QuantizedMatrix) -> dict[str, tuple[QuantizedMatrix, str]]:
    """Every field of a ragged matrix, changed, and the words of the refusal."""
    flipped, beyond = matrix.bitmap.clone(), matrix.bitmap.clone()
    flipped[2, 0] ^= 1
    flipped[2, 1] ^= 1
    flipped[2, 2] ^= 1
    beyond[0, -1] = 128
    scales, start = matrix.scales, matrix.row_start
    late, back, minus = start.clone(), start.clone(), start.clone()
    late[1:] += 1
    back[1] = start[2] + 1
    minus[0] = -1
    infinite = scales.clone()
    infinite[-1, -1] = float("inf")
    return {
        "bitmap": (replace(matrix, bitmap=flipped), "row_start does not agree"),
        "bits beyond": (replace(matrix, bitmap=beyond), "beyond the last column"),
        "words": (replace(matrix, bitmap=matrix.bitmap[:, :8]), "bitmap must be uint8"),
        "cols": (replace(matrix, cols=matrix.cols - 64), "must be"),
        "codes cut": (replace(matrix, codes=matrix.codes[:-1]), "row_start does not agree"),
        "codes longer": (replace(matrix, codes=torch.cat([matrix.codes, matrix.codes])), "row_start does not agree"),
        "codes of int8": (replace(matrix, codes=matrix.codes.view(torch.int8)), "codes have dtype"),
        "codes without starts": (replace(matrix, row_start=None), "codes have dtype"),
        "codes in rows": (replace(matrix, codes=matrix.codes[None]), "codes have dtype"),
        "starts late": (replace(matrix, row_start=late), "row_start does not agree"),
        "starts back": (replace(matrix, row_start=back), "row_start does not agree"),
        "starts negative": (replace(matrix, row_start=minus), "row_start does not agree"),
        "starts cut": (replace(matrix, row_start=start[:-1]), "row_start must be int64"),
        "starts of int32": (replace(matrix, row_start=start.int()), "row_start must be int64"),
        "scales cut": (replace(matrix, scales=scales[:, :-1]), "scales must be"),
        "scales of rows": (replace(matrix, scales=scales[:-1]), "scales must be"),
        "scales of int": (replace(matrix, scales=scales.int()), "scales must be"),
        "scales infinite": (replace(matrix, scales=infinite), "scales are not all finite"),
        "bits 8": (replace(matrix, bits=12 - matrix.bits), "row_start does not agree"),
        "bits 3": (replace(matrix, bits=3), "8 or 4 bits"),
        "group": (replace(matrix, group=128), "scales must be"),
        "group 0": (replace(matrix, group=0), "multiple of 64"),
        "group odd": (replace(matrix, group=65), "multiple of 64"),
    }


@pytest.mark.parametrize("bits", [8, 4])
def test_a_matrix_that_contradicts_itself_is_refused(bits, random):
    grid = Grid(bits, 64)
    weight = on_grid(make_weight(5, 150, torch.float32, random), grid)
    weight[1] = 0
    matrix = QuantizedMatrix.of(weight, grid).check()
    assert matrix.row_start is not None
    for damaged, words in damages(matrix).values():
        with pytest.raises(ValueError, match=words):
            damaged.check()


def test_rows_of_equal_length_that_are_not_are_refused():
    grid = Grid(4, 64)
    weight = on_grid(torch.ones(4, 64), grid)
    weight[:, 9:] = 0  # nine codes a row: five bytes
    matrix = QuantizedMatrix.of(weight, grid).check()
    bitmap, used = matrix.bitmap.clone(), matrix.codes.clone()
    bitmap[2, 4] |= 1  # a tenth code fits into the bytes of the row, but rows then differ
    used[2, -1] |= 0x70
    for damaged, words in (
        (replace(matrix, bitmap=bitmap), "codes of 5 bytes in every row"),
        (replace(matrix, codes=matrix.codes[:, :-1]), "codes of 4 bytes in every row"),
        (replace(matrix, codes=matrix.codes[:-1]), "codes of 5 bytes in every row"),
        (replace(matrix, codes=used), "unused half that is not 0"),
    ):
        with pytest.raises(ValueError, match=words):
            damaged.check()


# The codecs


def made(weight: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """The matrix pruned to N:M at random."""
    keep_n, group_m = pattern
    order = torch.rand(len(weight), weight.shape[1] // group_m, group_m).argsort(dim=2)
    weight.view(len(weight), -1, group_m).scatter_(2, order[:, :, keep_n:], 0.0)
    return weight


@grids
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (5, 7), (3, 8)])
def test_codecs_give_back_every_bit(name, pattern, grid, dtype, random):
    weight = on_grid(made(make_weight(12, 24 * pattern[1], dtype, random), pattern), grid)
    weight[0, : pattern[1]] = 0  # a group with fewer survivors
    codec = codec_named(name)
    parts = codec.encode(weight, pattern, grid)
    assert parts.keys() <= codec.quantized_parts
    assert "codes" in parts
    matrix = codec.decode(Packed(dict(parts), dtype, tuple(weight.shape), pattern, grid))
    assert isinstance(matrix, QuantizedMatrix)
    assert_same_bits(matrix.dense(), weight)
    with pytest.raises(ValueError, match="names no grid"):
        codec.decode(Packed(dict(parts), dtype, tuple(weight.shape), pattern))


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_on_the_grid_is_stored_as_before(name, random):
    grid = Grid(8, 128)
    weight = made(make_weight(64, 128, torch.bfloat16, random), (2, 4))
    few = torch.zeros(64, 512, dtype=torch.bfloat16)
    few[:, 0] = 1.0  # scales would take more than the values
    for tensor in (weight, few)[: 1 if name == "nm" else 2]:  # nm stores half of the weights, zero or not
        before = codec_named(name).encode(tensor, (2, 4))
        found = codec_named(name).encode(tensor, (2, 4), grid)
        assert (before is None) == (found is None)
        for part, value in (before or {}).items():
            assert torch.equal(found[part], value)


@pytest.mark.parametrize(("bits", "expected"), [(8, 5.125), (4, 3.125), (3, 3.125)])
@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_as_planned(name, bits, expected, random):
    """Half the weights of a bfloat16 matrix, none of which is rounded to zero: a bit for the weight, half of a code,
    and 16 bits of a scale for 128 weights. The archive's estimate is a rough one."""
    grid = Grid(bits, 128)
    codes = torch.randint(1, grid.highest + 1, (256, 1024), generator=random, dtype=torch.int8)
    codes *= 1 - 2 * torch.randint(0, 2, codes.shape, generator=random, dtype=torch.int8)
    scales = torch.rand(256, 8, generator=random).add(0.5).bfloat16()
    weight = made(grid.dequantize(codes, scales), (2, 4))
    size = sum(part.nbytes for part in codec_named(name).encode(weight, (2, 4), grid).values())
    planned = codec_named(name).size(Kept(256, 1024, weight.numel() // 2, torch.bfloat16, (2, 4), grid))
    if name == "archive":
        assert size < expected * weight.numel() / 8
        assert size == pytest.approx(planned, rel=0.15)
    else:
        assert size == planned == expected * weight.numel() / 8


def test_a_matrix_without_zeros_is_packed_too(random):
    """Also of 8 bits: codes, scales and the bitmap take fewer bytes than the values."""
    grid = Grid(8, 128)
    weight = on_grid(make_weight(64, 256, torch.bfloat16, random).abs() + 1, grid)
    assert weight.count_nonzero() == weight.numel()
    parts = codec_named("bitmap").encode(weight, None, grid)
    assert sum(part.nbytes for part in parts.values()) * 8 == (8 + 1 + 16 / 128) * weight.numel()


# Folders


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    dense = save_dense(folder / "dense", "opt")  # has biases
    prune(dense, folder / "pruned", method="magnitude", pattern="2:4")
    return folder / "pruned"


@pytest.fixture(scope="module", params=GRIDS, ids=bits_of)
def quantized(request, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "quantized"
    return quantize_folder(pruned, folder, request.param), request.param


@pytest.mark.parametrize("name", CODECS)
def test_every_byte_of_a_folder_comes_back(name, quantized, tmp_path, capsys):
    """The command line takes the grid from the report."""
    dense, grid = quantized
    assert main(["pack", str(dense), "--output", str(tmp_path / "p"), "--format", name, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["matrices"] == result["quantized"] == 18
    shards = PackedShards(tmp_path / "p")
    bits = 8 * result["matrix_packed_bytes"] / result["matrix_weights"]
    assert shards.code_bits() == (grid, pytest.approx(bits))
    assert shards.packed[0].origin.version == "2"
    assert f"{bits:.2f} bits, zeros included" in (tmp_path / "p" / "README.md").read_text()
    assert main(["unpack", str(tmp_path / "p"), "--output", str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == files_of(dense)
    assert main(["verify", str(tmp_path / "p")]) == 0
    assert main(["pack", str(dense), "--output", str(tmp_path / "twice"), "--format", name]) == 0
    assert f"18 matrices (18 as codes), {bits:.2f} bits a weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "save"), [("llama-tied", {"max_shard_size": "4KB"}), ("mixtral", {}), ("granite-moe", {})]
)
def test_families_and_files(family, save, tmp_path):
    """Several files, experts of their own and fused ones."""
    dense = save_dense(tmp_path / "dense", family, **save)
    prune(dense, tmp_path / "pruned", method="magnitude", calibration={"source": "tokens"})
    dense = quantize_folder(tmp_path / "pruned", tmp_path / "quantized", Grid(4, 64))
    result = pack(dense, tmp_path / "packed", "bitmap", grid=Grid(4, 64))
    assert result.quantized >= result.matrices - 3 > 6  # routers have few columns
    unpack(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(dense)
    versions = {one.origin.version for one in PackedShards(tmp_path / "packed").packed}
    assert versions == ({"1", "2"} if save else {"2"})


GOLDEN = {
    "bitmap": "aa6dc55a398289006d3bdb7b1133c9afba1c8e3ece89e7db6e8ce65c6e0cce86",
    "nm": "fcb0c0fa1514728c649d37eedf90cfcd3beca6f2e52af9a6c3fbb11c0bbab256",
}
"""SHA-256 of packed files that were written before there were codes."""


@pytest.mark.parametrize("name", GOLDEN)
def test_files_without_codes_are_unchanged(name, tmp_path):
    weight = (torch.arange(32 * 96, dtype=torch.float32).view(32, 96) % 7 - 3).to(torch.bfloat16)
    weight.view(-1, 4)[:, 2:] = 0
    (tmp_path / "dense").mkdir()
    save_file({"a.weight": weight, "b": torch.ones(3)}, tmp_path / "dense/model.safetensors")
    pack(tmp_path / "dense", tmp_path / "packed", name, (2, 4))
    file = tmp_path / f"packed/model{SUFFIX}"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == GOLDEN[name]
    assert PackedShards(tmp_path / "packed").packed[0].origin.version == "1"


def test_a_grid_that_no_matrix_is_on_leaves_version_1(pruned, tmp_path):
    pack(pruned, tmp_path / "packed", "bitmap", grid=Grid(4, 64))
    (one,) = PackedShards(tmp_path / "packed").packed
    assert (one.origin.version, one.origin.grid) == ("1", None)


# Refusals


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("quantize(bits=5)", r"bits must be one of 8, 4, 3 \(got 5\)"),
        ("quantize(bits=x)", r"bits must be a whole number \(got 'x'\)"),
        ("quantize(bits=4, group=96)", r"group must be a multiple of 64 \(got 96\)"),
        ("quantize(group=" + "9" * 5000 + ")", "group must be a whole number"),
        ("quantize(group=-128)", r"group must be a multiple of 64 \(got -128\)"),
    ],
)
def test_a_report_that_names_no_grid_is_refused(stage, words, pruned, tmp_path, capsys):
    shutil.copytree(pruned, tmp_path / "dense")
    path = tmp_path / "dense" / REPORT_NAME
    report = json.loads(path.read_text())
    report["config"]["method"] = f"magnitude + {stage}"
    path.write_text(json.dumps(report))
    line = refused(capsys, "pack", tmp_path / "dense", "--output", tmp_path / "packed")
    assert REPORT_NAME in line
    assert re.search(words, line)
    assert not (tmp_path / "packed").exists()


def edit(folder, change) -> None:
    """Changes a packed file's header: ``change(header, origin)``."""
    (path,) = folder.glob(f"*{SUFFIX}")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    origin = json.loads(header["__metadata__"][KEY])
    change(header, origin)
    header["__metadata__"][KEY] = json.dumps(origin)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def first(header, part: str) -> str:
    return next(name for name in header if name.endswith(f".{part}"))


EDITS = {
    "version 1": (lambda _, origin: origin.update(version="1"), "the file names no grid"),
    "version 3": (lambda _, origin: origin.update(version="3"), "damaged metadata"),
    "version 4": (lambda _, origin: origin.update(version="4"), "reads versions 1 to 3"),
    "no grid": (lambda _, origin: origin.pop("grid"), "damaged metadata"),
    "grid 5": (lambda _, origin: origin.update(grid=5), "damaged metadata"),
    "grid null": (lambda _, origin: origin.update(grid=None), "damaged metadata"),
    "no bits": (lambda _, origin: origin.update(grid={"group": 64}), "damaged metadata"),
    "bits 5": (lambda _, origin: origin["grid"].update(bits=5), "damaged metadata"),
    "bits true": (lambda _, origin: origin["grid"].update(bits=True), "damaged metadata"),
    "bits 4.0": (lambda _, origin: origin["grid"].update(bits=4.0), "damaged metadata"),
    "bits text": (lambda _, origin: origin["grid"].update(bits="4"), "damaged metadata"),
    "another width": (lambda _, origin: origin["grid"].update(bits=8 if origin["grid"]["bits"] < 8 else 4), "damaged"),
    "group 0": (lambda _, origin: origin["grid"].update(group=0), "damaged metadata"),
    "group -64": (lambda _, origin: origin["grid"].update(group=-64), "damaged metadata"),
    "group 96": (lambda _, origin: origin["grid"].update(group=96), "damaged metadata"),
    "group 2^31": (lambda _, origin: origin["grid"].update(group=2**31), "damaged metadata"),
    "group 10^30": (lambda _, origin: origin["grid"].update(group=10**30), "damaged metadata"),
    "codes of int8": (lambda header, _: header[first(header, "codes")].update(dtype="I8"), "damaged"),
    "codes flat": (lambda header, _: _flatten(header[first(header, "codes")]), "damaged"),
    "scales flat": (lambda header, _: _flatten(header[first(header, "scales")]), "part scales must be"),
    "scales of float16": (lambda header, _: header[first(header, "scales")].update(dtype="F16"), "part scales must be"),
    "bitmap flat": (lambda header, _: _flatten(header[first(header, "bitmap")]), "part bitmap must be"),
    "codes renamed": (lambda header, _: _rename(header, "codes", "values"), "belongs to no tensor"),
    "scales renamed": (lambda header, _: _rename(header, "scales", "row_start"), "part scales is missing"),
    "values beside": (lambda header, _: header.update(_beside(header)), "belongs to no tensor"),
}


def _flatten(entry) -> None:
    size = 1
    for length in entry["shape"]:
        size *= length
    entry["shape"] = [size]


def _rename(header, old: str, new: str) -> None:
    name = first(header, old)
    header[name.removesuffix(old) + new] = header.pop(name)


def _beside(header) -> dict:
    """An entry ``values`` of no bytes beside the last codes."""
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    name = first(header, "codes").removesuffix("codes") + "values"
    return {name: {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}}


@four_bits
@pytest.mark.parametrize("how", EDITS)
def test_edited_headers_are_refused_in_one_line(how, quantized, tmp_path, capsys):
    dense, grid = quantized
    pack(dense, tmp_path / "packed", "bitmap", grid=grid)
    change, words = EDITS[how]
    edit(tmp_path / "packed", change)
    line = refused(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "again")
    assert words in line
    assert not (tmp_path / "again").exists()


@four_bits
@pytest.mark.parametrize("name", CODECS)
def test_no_changed_byte_goes_unseen(name, quantized, tmp_path):
    """One bit of each part of each matrix, at its begin, middle and end."""
    dense, grid = quantized
    pack(dense, tmp_path / "packed", name, (2, 4), grid)
    (path,) = tmp_path.glob(f"packed/*{SUFFIX}")
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    parts = [
        entry["data_offsets"] for key, entry in header.items() if key.split(".")[-1] in CODECS[name].quantized_parts
    ]
    assert len(parts) >= 18 * 3
    for begin, end in parts[::5]:
        for place in {begin, (begin + end) // 2, end - 1}:
            data = bytearray(whole)
            data[8 + length + place] ^= 1
            path.write_bytes(data)
            with pytest.raises(InputError):
                check_hashes(PackedShards(path.parent))


def test_codes_and_values_are_told_apart(random):
    """PackedMatrix and QuantizedMatrix of the same weights."""
    grid = Grid(8, 64)
    weight = on_grid(half(16, 128, torch.float16, random), grid)
    one, other = PackedMatrix.of(weight), QuantizedMatrix.of(weight, grid)
    assert_same_bits(one.dense(), other.dense())
    assert torch.equal(one.bitmap, other.bitmap)
    assert one.stored == other.stored == 16 * 64
    assert one.nbytes > other.nbytes
