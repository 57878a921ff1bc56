"""Safetensors one tensor at a time: against the library, and on files that are damaged, short or missing."""

import json
import struct

import pytest
import torch
from folders import save_dense, weights_bytes
from safetensors.torch import load_file, save_file

from ace_ext import InputError
from ace_ext.models.safetensors_files import INDEX, SINGLE, Shards, copy_model
from ace_ext.models.safetensors_header import STORED_DTYPES


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of each dtype, a scalar and one without elements."""
    random = torch.Generator().manual_seed(seed)
    drawn = {str(d): (torch.randn(3, 5, generator=random) * 50).to(d) for d in STORED_DTYPES.values()}
    return {**drawn, "scalar": torch.tensor(2.5 + seed), "none": torch.zeros(0, 4)}


def assert_same(shards: Shards, expected: dict[str, torch.Tensor]) -> None:
    assert shards.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        found = shards.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


@pytest.fixture
def folder(tmp_path):
    save_file(tensors(), tmp_path / SINGLE, {"format": "pt"})
    return tmp_path


def test_reads_what_the_library_writes(folder):
    assert_same(Shards(folder), tensors())


def test_the_dtype_is_that_of_the_first_floats(tmp_path):
    ids, weight = torch.arange(4), torch.zeros(2, 2, dtype=torch.float16)
    save_file({"embeddings.position_ids": ids, "embeddings.weight": weight}, tmp_path / SINGLE, {"format": "pt"})
    assert Shards(tmp_path).dtype == torch.float16
    save_file({"ids": ids}, tmp_path / SINGLE, {"format": "pt"})
    assert Shards(tmp_path).dtype == torch.int64


def test_writes_what_the_library_reads(folder):
    before = (folder / SINGLE).read_bytes()
    shards = Shards(folder)
    changed = dict(list(tensors(1).items())[:4])
    shards.write(changed)
    expected = {**tensors(), **changed}
    assert_same(Shards(folder), expected)
    loaded = load_file(folder / SINGLE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    shards.write({name: tensors()[name] for name in changed})
    assert (folder / SINGLE).read_bytes() == before  # nothing else was touched
    transposed = torch.arange(15).view(5, 3).float().t()
    shards.write({"torch.float32": transposed})
    assert torch.equal(shards.read("torch.float32"), transposed)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            {"torch.float32": torch.zeros(5, 3)},
            r"must be torch.float32 \[3, 5\] as in .* \(got torch.float32 \[5, 3\]\)",
        ),
        ({"torch.float32": torch.zeros(3, 5).half()}, r"\(got torch.float16 \[3, 5\]\)"),
        ({"other": torch.zeros(3, 5)}, "has no tensor other"),
    ],
)
def test_a_patch_that_does_not_fit_writes_nothing(tensor, message, folder):
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(InputError, match=message):
        Shards(folder).write({"torch.int64": torch.ones(3, 5, dtype=torch.int64), **tensor})
    assert (folder / SINGLE).read_bytes() == before


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(**changed) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


def twice(first: dict, second: dict) -> bytes:
    """A JSON object with the entries of both, whose names may be the same."""
    return f"{json.dumps(first)[:-1]}, {json.dumps(second)[1:]}".encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        with_header(b"{"),
        with_header(b"\xff\xff"),
        with_header(5),
        with_header([1]),
        with_header({"w": 3}),
        with_header({"w": {}}),
        with_header(one()),  # its bytes are missing
        with_header(one(data_offsets=[0]), bytes(8)),
        with_header(one(data_offsets=[-8, 0]), bytes(8)),
        with_header(one(data_offsets=[0, 4]), bytes(8)),
        with_header(one(shape=[3]), bytes(8)),
        with_header(one(shape=[-1, -2]), bytes(8)),
        with_header(one(shape=["x"]), bytes(8)),
        with_header(one(), bytes(9)),  # a byte that no tensor owns
        with_header({**one(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),  # overlap
        with_header({**one(), "v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(16)),  # a gap
        with_header(twice(one(), one(data_offsets=[8, 16])), bytes(16)),  # two tensors of one name
    ],
)
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file: .*; fetch it again"):
        Shards(tmp_path)


def test_other_dtypes_are_named(tmp_path):
    (tmp_path / SINGLE).write_bytes(with_header(one(dtype="F8_E4M3", data_offsets=[0, 2]), bytes(2)))
    with pytest.raises(InputError, match="holds w as F8_E4M3; give a checkpoint that is not quantized"):
        Shards(tmp_path)


def test_a_file_cut_after_it_was_opened(folder):
    shards = Shards(folder)
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])
    last = max(shards.entries, key=lambda name: shards.entries[name].offset)
    with pytest.raises(InputError, match=f"ends before its tensor {last}; fetch the file again"):
        shards.read(last)


# Several files


@pytest.fixture
def sharded(tmp_path):
    return save_dense(tmp_path / "dense", max_shard_size="20KB")


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"lacks {gone.name}, which its index names"):
        Shards(sharded)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', "\xff"])
def test_damaged_indices_are_named(text, sharded):
    (sharded / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="is not a safetensors index"):
        Shards(sharded)


def test_no_safetensors(tmp_path):
    with pytest.raises(InputError, match=r"has no model\.safetensors and no model\.safetensors\.index\.json"):
        Shards(tmp_path)


def test_one_file_goes_before_an_index(sharded):
    """As transformers has it: what is read and patched must be what it would load."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sharded)
    model.model.norm.weight.data.fill_(7)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, sharded / SINGLE, {"format": "pt"})
    assert (AutoModelForCausalLM.from_pretrained(sharded).model.norm.weight == 7).all()
    assert (Shards(sharded).read("model.norm.weight") == 7).all()
    copy_model(sharded, sharded.parent / "copy")
    assert weights_bytes(sharded.parent / "copy").keys() == {SINGLE}
    assert not (sharded.parent / "copy" / INDEX).exists()


def test_a_copy_leaves_other_formats(sharded, tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "consolidated.safetensors"):
        (sharded / name).touch()
    (sharded / "modeling_own.py").touch()
    copy_model(sharded, tmp_path / "copy")
    assert weights_bytes(tmp_path / "copy").keys() < weights_bytes(sharded).keys()
    others = {f.name for f in (tmp_path / "copy").iterdir()} - weights_bytes(tmp_path / "copy").keys()
    assert {INDEX, "config.json", "tokenizer.json", "modeling_own.py"} <= others
    assert not others & {"pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"}
