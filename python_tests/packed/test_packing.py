"""Packed folders: every byte is restored, sizes are right, and damaged files are refused in one line."""

import json
import random as plain_random
import shutil

import every_class
import pytest
import torch
from folders import prune, save_dense, tree
from helpers import DTYPES, assert_same_bits, make_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ace_ext import InputError, load_packed
from ace_ext.cli.main import main
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed import CODECS, codec_named
from ace_ext.packed._codec import Packed
from ace_ext.packed.files import KEY, SUFFIX, PackedShards, is_packed
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.packing import check_hashes, pack, unpack
from ace_ext.runs.output import read_report
from ace_ext.runs.verify import verify

SHAPES = ((1, 1), (2, 1), (1, 64), (3, 65), (31, 33), (5, 128), (2, 1134))


def half(rows: int, cols: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Each row keeps half of its weights."""
    weight = make_weight(rows, cols, dtype, random).masked_fill_(torch.zeros(rows, cols).bool(), 0)
    order = torch.rand(rows, cols, generator=random).argsort(dim=1)
    return weight.scatter_(1, order[:, cols // 2 :], 0.0)


# The matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_comes_back_bit_for_bit(shape, dtype, random):
    for weight in (
        half(*shape, dtype, random),
        make_weight(*shape, dtype, random, ties=True),  # zeros of both signs
        torch.zeros(shape, dtype=dtype),
        make_weight(*shape, dtype, random),
    ):
        matrix = PackedMatrix.of(weight).check()
        assert_same_bits(matrix.dense(), weight)
        assert matrix.shape == shape


def test_rows_of_equal_length_need_no_row_start(random):
    weight = half(8, 128, torch.bfloat16, random)
    matrix = PackedMatrix.of(weight)
    assert matrix.row_start is None
    assert tuple(matrix.values.shape) == (8, 64)
    assert matrix.nbytes == weight.nbytes * 9 // 16
    weight[3, weight[3].nonzero()[0]] = 0.0  # the dense weight had a zero there
    matrix = PackedMatrix.of(weight).check()
    assert matrix.row_start is None
    assert_same_bits(matrix.dense(), weight)
    weight[:4] = 0.0
    matrix = PackedMatrix.of(weight).check()
    assert matrix.row_start.tolist() == [0, 0, 0, 0, 0, 64, 128, 192, 256]
    assert_same_bits(matrix.dense(), weight)


def test_a_matrix_that_contradicts_itself_is_refused(random):
    matrix = PackedMatrix.of(half(4, 70, torch.float32, random))
    flipped = matrix.bitmap.clone()
    flipped[2, 0] ^= 1
    beyond = matrix.bitmap.clone()
    beyond[0, 15] = 128
    for bitmap, words in ((flipped, "35 survivors in every row"), (beyond, "beyond the last column")):
        with pytest.raises(ValueError, match=words):
            PackedMatrix(bitmap, matrix.values, None, 70).check()
    ragged = PackedMatrix(matrix.bitmap, matrix.values.flatten(), torch.tensor([0, 35, 70, 104, 140]), 70)
    with pytest.raises(ValueError, match="row_start does not agree"):
        ragged.check()


# The codecs


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8), (5, 7), (1, 2)])
def test_codecs_give_back_every_bit(name, pattern, dtype, random):
    keep_n, group_m = pattern
    weight = make_weight(6, 10 * group_m, dtype, random)
    order = torch.rand(6, 10, group_m, generator=random).argsort(dim=2)
    weight.view(6, 10, group_m).scatter_(2, order[:, :, keep_n:], 0.0)
    weight[0, :group_m] = 0.0  # a group with fewer survivors
    codec = codec_named(name)
    parts = codec.encode(weight, pattern)
    if parts is None:  # a few numbers: what zstd adds, or whole words of the bitmap, is more than the zeros
        assert name == "archive" or group_m < 10
        return
    matrix = codec.decode(Packed(dict(parts), weight.dtype, tuple(weight.shape), pattern))
    assert_same_bits(matrix.dense(), weight)


@pytest.mark.parametrize("pattern", [(2, 4), (3, 8), (2, 5)])
def test_indices_that_are_none_are_refused(pattern, random):
    """Equal indices, indices beyond their group, and a file without a pattern."""
    keep_n, group_m = pattern
    weight = make_weight(4, 16 * group_m, torch.float32, random)
    weight.view(4, 16, group_m)[:, :, keep_n:] = 0.0
    parts, codec = codec_named("nm").encode(weight, pattern), codec_named("nm")
    for byte in (0, 255):
        damaged = {**parts, "indices": torch.full_like(parts["indices"], byte)}
        with pytest.raises(ValueError, match=f"must be ascending and less than {group_m}"):
            codec.decode(Packed(damaged, weight.dtype, tuple(weight.shape), pattern))
    with pytest.raises(ValueError, match="names no pattern"):
        codec.decode(Packed(dict(parts), weight.dtype, tuple(weight.shape), None))
    with pytest.raises(ValueError, match="not whole groups"):
        codec.decode(Packed(dict(parts), weight.dtype, (4, 16 * group_m - 1), pattern))
    with pytest.raises(ValueError, match="part indices is missing"):
        codec.decode(Packed({"values": parts["values"]}, weight.dtype, tuple(weight.shape), pattern))


def test_a_packed_folder_is_not_written_in_place(pruned, tmp_path):
    pack(pruned, tmp_path / "packed", "bitmap")
    with pytest.raises(InputError, match="is packed; unpack it first"):
        PackedShards(tmp_path / "packed").write({})


def test_the_archive_gives_back_tensors_that_are_no_matrix(random):
    archive = codec_named("archive")
    kept = (torch.rand(4096, generator=random) < 0.5).float() * torch.randn(4096, generator=random)
    for tensor in (*(kept.to(dtype) for dtype in DTYPES), torch.arange(4096), torch.zeros(4096, dtype=torch.bool)):
        parts = archive.encode(tensor, None)
        found = archive.decode(Packed(dict(parts), tensor.dtype, tuple(tensor.shape), None))
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_sizes_at_half_sparsity(random):
    """9/16 of a bfloat16 matrix for a bitmap. The archive: a bit for a weight, and the 8 bits of a survivor that are
    random; exponents of normal numbers take 2.55 bits, and zstd's Huffman code at most 3."""
    weight = half(256, 1024, torch.bfloat16, random)
    sizes = {
        name: sum(p.nbytes for p in codec_named(name).encode(weight, None).values()) for name in ("bitmap", "archive")
    }
    assert sizes["bitmap"] == weight.nbytes * 9 // 16
    assert sizes["archive"] < weight.nbytes * (1 + (8 + 3) / 2) / 16


# Folders


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    dense = save_dense(folder / "dense", "opt")  # has biases
    prune(dense, folder / "pruned", method="magnitude")
    return folder / "pruned"


def files_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["bitmap", "archive"])
@pytest.mark.parametrize(
    ("family", "config", "save"),
    [
        ("llama", {}, {}),
        ("llama-tied", {"sparsity": 0.7}, {"max_shard_size": "20KB"}),
        ("opt", {"group": "matrix"}, {}),
        ("mixtral", {}, {}),
        ("granite-moe", {"group": "model"}, {}),  # experts are stored as fused tensors of three dimensions
    ],
)
def test_every_byte_of_a_folder_comes_back(name, family, config, save, tmp_path):
    dense = save_dense(tmp_path / "dense", family, **save)
    prune(dense, tmp_path / "pruned", method="magnitude", calibration={"source": "tokens"}, **config)
    result = pack(tmp_path / "pruned", tmp_path / "packed", name)
    assert result.matrices >= 18
    assert result.matrix_packed_bytes < 0.8 * result.matrix_dense_bytes
    assert is_packed(tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "pruned")
    assert len(list(tmp_path.iterdir())) == 5  # no temporary folder is left


def test_a_pattern_is_packed_by_its_indices(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    prune(dense, tmp_path / "pruned", method="magnitude", pattern="2:4")
    run = ["pack", str(tmp_path / "pruned"), "--output", str(tmp_path / "packed"), "--format", "nm", "--json"]
    assert main(run) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["matrices"] == 21
    assert result["matrix_packed_bytes"] / result["matrix_dense_bytes"] == 9 / 16
    assert main(["unpack", str(tmp_path / "packed"), "--output", str(tmp_path / "again")]) == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "pruned")


def test_it_says_what_stays_dense(tmp_path, capsys):
    """The experts of GPT-OSS are stored transposed, so N:M is not along the rows of their tensors."""
    every_class.build("gpt_oss").save_pretrained(tmp_path / "dense")
    options = {"method": "magnitude", "pattern": "2:4", "calibration": {"source": "tokens"}}
    report, _ = prune(tmp_path / "dense", tmp_path / "pruned", **options)
    experts = sum(matrix.size for matrix in report.matrices if ".experts." in matrix.name)
    share = experts / sum(matrix.size for matrix in report.matrices)
    for name, expected in (("nm", [f"{share:.0%} of the pruned weights are stored dense"]), ("bitmap", [])):
        assert main(["pack", str(tmp_path / "pruned"), "--output", str(tmp_path / name), "--format", name]) == 0
        noted = [line for line in capsys.readouterr().out.splitlines() if "stored dense" in line]
        assert [line.partition(":")[0] for line in noted] == expected


def test_only_matrices_with_zeros_are_packed(pruned, tmp_path):
    pack(pruned, tmp_path / "packed", "bitmap")
    packed, dense = PackedShards(tmp_path / "packed"), Shards(pruned)
    assert packed.entries.keys() == dense.entries.keys()
    kinds = {name: isinstance(packed.load(name), PackedMatrix) for name in dense.entries}
    assert {name for name, is_matrix in kinds.items() if is_matrix} == {
        name for name in kinds if ".layers." in name and name.endswith(".weight") and "norm" not in name
    }
    for name in dense.entries:
        assert_same_bits(packed.read(name), dense.read(name))


def test_mapped_values_begin_at_a_cache_line(pruned, tmp_path):
    pack(pruned, tmp_path / "packed", "bitmap")
    (path,) = tmp_path.glob(f"packed/*{SUFFIX}")
    text = path.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    starts = [8 + length + entry["data_offsets"][0] for name, entry in header.items() if name.endswith(".values")]
    assert starts
    assert all(start % 64 == 0 for start in starts)


# Refusals


def refused(capsys, *arguments) -> str:
    """The one line of a command that ends with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_requests_are_refused_in_one_line(pruned, tmp_path, capsys):
    output = tmp_path / "out"
    assert "pattern N:M" in refused(capsys, "pack", pruned, "--output", output, "--format", "nm")
    dense = save_dense(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    assert "no matrix" in refused(capsys, "pack", dense, "--output", output)
    assert "has no model.safetensors" in refused(capsys, "pack", tmp_path / "empty", "--output", output)
    assert "exists" in refused(capsys, "pack", pruned, "--output", dense)
    pack(pruned, output, "bitmap")
    assert "packed already" in refused(capsys, "pack", output, "--output", tmp_path / "twice")
    assert "holds no packed.safetensors" in refused(capsys, "unpack", pruned, "--output", tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "empty", "out", "text.txt"]


@pytest.mark.parametrize("place", ["", "inside", "new/inside"])
def test_nothing_is_written_into_the_input(place, pruned, tmp_path, capsys):
    pack(pruned, tmp_path / "packed", "bitmap")
    for verb, folder in (("pack", pruned), ("unpack", tmp_path / "packed")):
        before = tree(folder)
        line = refused(capsys, verb, folder, "--output", folder / place)
        assert "overlaps an input of this run" in line
        assert tree(folder) == before


@pytest.mark.parametrize("verb", ["verify", "heal", "pack", "unpack", "bench"])
def test_a_folder_that_does_not_exist(verb, tmp_path, capsys):
    options = [] if verb in ("verify", "bench") else ["--output", tmp_path / "out"]
    assert refused(capsys, verb, tmp_path / "nowhere", *options).endswith("nowhere' is not a folder; check the path")


@pytest.mark.parametrize("format", ["bitmap", "compressed-tensors"])
def test_a_folder_that_changed_is_not_packed(format, pruned, tmp_path, capsys):
    """Its card and report would claim zeros that the packed file does not have."""
    changed = shutil.copytree(pruned, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][0] = 1.0
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    error = refused(capsys, "pack", changed, "--output", tmp_path / "out", "--format", format)
    assert "has changed since ace-prune wrote it: model.decoder.layers.0.fc1" in error
    assert not (tmp_path / "out").exists()


def test_heal_says_how_to_get_the_dense_folder(pruned, tmp_path, capsys):
    pack(pruned, tmp_path / "packed", "bitmap")
    assert "ace-prune unpack" in refused(capsys, "heal", tmp_path / "packed", "--output", tmp_path / "out")


def damage(folder, how) -> None:
    (path,) = folder.glob(f"*{SUFFIX}")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if how == "cut":
        data = data[:-100]
    elif how == "foreign":
        save_file({"a": torch.zeros(3)}, path)
        return
    elif how == "bit of a bitmap":
        name = next(name for name in header if name.endswith(".bitmap"))
        data[8 + length + header[name]["data_offsets"][0]] ^= 1
    elif how == "value":
        name = next(name for name in header if name.endswith(".values"))
        data[8 + length + header[name]["data_offsets"][0]] ^= 1
    else:
        origin = json.loads(header["__metadata__"][KEY])
        if how == "version":
            origin["version"] = "9"
        elif how == "codec":
            origin["codec"] = "other"
        elif how == "shape":
            origin["header"] = origin["header"].replace('"shape":[64,32]', '"shape":[32,64]', 1)
        elif how == "pattern":
            origin["pattern"] = 7
        elif how == "no text":
            origin["sha256"] = 7
        elif how == "part without a tensor":
            name = next(name for name in header if name.endswith(".bitmap"))
            header[name.replace(".bitmap", ".bitmop")] = header.pop(name)
        elif how == "second file":
            origin["files"].append("model-2.safetensors")
        header["__metadata__"][KEY] = json.dumps(origin)
        text = json.dumps(header, separators=(",", ":")).encode()
        data[8 : 8 + length] = text.ljust(length)[:length]
        assert len(text) <= length
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "not a complete safetensors file"),
        ("foreign", "was not written by ace-prune pack"),
        ("bit of a bitmap", "survivors in every row"),
        ("value", "does not restore the file"),
        ("version", "version '9'"),
        ("codec", "format 'other'"),
        ("shape", "is damaged"),
        ("second file", "lacks these files"),
        ("pattern", "has damaged metadata"),
        ("no text", "must be texts"),
        ("part without a tensor", ".bitmop belongs to no tensor"),
    ],
)
def test_damaged_files_are_refused_in_one_line(how, words, pruned, tmp_path, capsys):
    pack(pruned, tmp_path / "packed", "bitmap")
    damage(tmp_path / "packed", how)
    assert words in refused(capsys, "unpack", tmp_path / "packed", "--output", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["bitmap", "archive"])
def test_no_changed_byte_goes_unseen(name, pruned, tmp_path):
    """Bytes of header and tensors are changed at random: the folder is refused, or only padding was hit."""
    pack(pruned, tmp_path / "packed", name)
    (path,) = tmp_path.glob(f"packed/*{SUFFIX}")
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    with safe_open(path, "pt") as file:
        padding = sum(file.get_tensor(key).numel() for key in file.keys() if key.startswith("pad."))  # noqa: SIM118
    random = plain_random.Random(0)
    unseen, tries = 0, 150
    for number in range(tries):
        data = bytearray(whole)
        place = random.randrange(8 + length if number % 2 else len(data))
        data[place] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        try:
            check_hashes(PackedShards(path.parent))
            unseen += 1
        except InputError:
            pass
    spaces = len(whole[8 : 8 + length]) - len(whole[8 : 8 + length].rstrip())
    # Changes of padding, and of the names of padding tensors, are harmless. Half of the places are in the header.
    assert unseen <= tries * (0.02 + padding / len(whole) + spaces / length + 0.1)


def test_arguments_of_other_types_are_named(pruned, tmp_path):
    output, report = tmp_path / "output", read_report(pruned)
    for call, words in (
        (lambda: load_packed(None), r"folder must be a path \(got NoneType\)"),
        (lambda: verify(b"pruned"), r"folder must be a path \(got bytes\)"),
        (lambda: unpack(["packed"], output), r"folder must be a path \(got list\)"),
        (lambda: pack("", output, "bitmap"), "'' is not a folder"),
        (lambda: pack(pruned, None, "bitmap"), r"output must be a path \(got NoneType\)"),
        (lambda: pack(pruned, output, []), r"format must be one of .* \(got \[\]\)"),
        (lambda: pack(pruned, output, "nm", "2:4"), r"pattern must be two whole numbers .* \(got '2:4'\)"),
        (lambda: pack(pruned, output, "nm", (2, 0)), r"pattern must be two whole numbers .* \(got '\(2, 0\)'\)"),
        (lambda: pack(pruned, output, "bitmap", None, 4), r"grid must be an ace_ext\.grids\.Grid \(got int\)"),
        (lambda: report.save(tmp_path / "none"), "none' is not a folder; check the path"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    assert not output.exists()


def test_nothing_is_left_after_an_error(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("ace_ext.packed.packing.check_hashes", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match="cannot be written: No space left"):
        pack(pruned, tmp_path / "packed", "bitmap")
    assert not list(tmp_path.iterdir())
    shutil.copytree(pruned, tmp_path / "copy")


def test_indices_of_2_4_are_those_of_torch(random):
    """After torch's reordering: the metadata of a semi-structured tensor, from which torch unpacks the weight."""
    from torch.sparse import _semi_structured_conversions as torch_24

    weight = torch.randn(64, 128, generator=random).bfloat16()
    order = torch.rand(64, 32, 4, generator=random).argsort(dim=2)
    weight.view(64, 32, 4).scatter_(2, order[:, :, 2:], 0.0)
    parts = codec_named("nm").encode(weight, (2, 4))
    meta = parts["indices"].view(torch.int16)
    places = torch_24._calculate_meta_reordering_scatter_offsets(*meta.shape, torch.int16, meta.device)
    reordered = torch.empty_like(meta.flatten()).scatter_(0, places, meta.flatten()).view(meta.shape)
    assert torch.equal(torch_24.sparse_semi_structured_to_dense_cutlass(parts["values"], reordered), weight)
