"""The walk through a GGUF file's header: what it counts must be in the file. The reader for files that pass."""

import struct
import time

import gguf
import numpy as np
import pytest

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.models.gguf_header import check_gguf, gguf_reader

UINT8, UINT32, FLOAT32, STRING, ARRAY = 0, 4, 6, 8, 9


def text(value, order="<"):
    return struct.pack(order + "Q", len(value)) + value


def head(keys=(), tensors=(), counts=None, order="<", version=3):
    counted = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack(order + "IQQ", version, *counted) + b"".join((*keys, *tensors))


def key(kind, value, order="<", name=b"general.name"):
    return text(name, order) + struct.pack(order + "I", kind) + value


def array(kind, count, values=b"", order="<"):
    return struct.pack(order + "IQ", kind, count) + values


def tensor(dims=1):
    return text(b"norm.weight") + struct.pack("<I", dims) + struct.pack("<Q", 32) * min(dims, 4) + bytes(12)


WORDS = array(STRING, 2, text(b"a") + text(b"the"))


@pytest.mark.parametrize(
    "content",
    [
        head(),
        head([key(UINT32, bytes(4)), key(STRING, text(b"llama")), key(ARRAY, WORDS)], [tensor(), tensor(4)]),
        head([key(ARRAY, array(FLOAT32, 3, bytes(12)))]),
        head([key(ARRAY, array(ARRAY, 2, 2 * array(UINT8, 3, bytes(3))))]),
        head([key(ARRAY, array(STRING, 1, text(b"a", ">"), ">"), ">")], order=">"),
    ],
)
@pytest.mark.parametrize("more", [b"", bytes(5)], ids=["", "and data"])
def test_sound_headers(content, more, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content + more)
    check_gguf(tmp_path / "m.gguf")
    if not more:  # and one byte less is too little
        (tmp_path / "m.gguf").write_bytes(content[:-1])
        with pytest.raises(InputError, match=r"m\.gguf' is not a complete GGUF file: .*; fetch it again"):
            check_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"GGU", "does not begin with GGUF"),
        (b"PK\x03\x04" + bytes(20), "does not begin with GGUF"),
        (head(counts=(2**60, 0)), f"{2**60} items of 24 bytes at byte 24 of 24"),
        (head(counts=(0, 2**60)), f"{2**60} items of 12 bytes"),
        (head([key(ARRAY, array(UINT8, 2**60))]), f"{2**60} items of 1 bytes"),
        (head([key(ARRAY, array(STRING, 2**60))]), f"{2**60} items of 8 bytes"),
        (head([key(ARRAY, array(ARRAY, 2**60))]), f"{2**60} items of 8 bytes"),
        (head([key(ARRAY, 9 * array(ARRAY, 1))]), "a value of type 9"),
        (head([key(STRING, struct.pack("<Q", 2**63))]), f"{2**63} items of 1 bytes"),
        (head([key(13, bytes(8))]), "a value of type 13 at byte 48"),
        (head([key(ARRAY, array(77, 1, bytes(8)))]), "a value of type 77"),
        (head(tensors=[tensor(2**31)]), f"{2**31} items of 8 bytes"),
    ],
)
def test_counts_that_do_not_fit(content, words, tmp_path, capsys):
    """Some of these keep the library that reads GGUF busy without end."""
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.monotonic()
    assert main(["plan", "--model", str(tmp_path / "m.gguf")]) == 2
    assert time.monotonic() - start < 5
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "is not a complete GGUF file: " in printed.err
    assert words in printed.err


def test_the_reader_returns_what_that_of_the_library_does(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("model")
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["a", "the", "\N{SNOWMAN}"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    values = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("plain", values)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("rounded", gguf.quantize(values, q8), raw_dtype=q8)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()

    check_gguf(path)
    own, library = gguf_reader(path), gguf.GGUFReader(path)
    assert list(own.fields) == list(library.fields)
    for field, expected in zip(own.fields.values(), library.fields.values(), strict=True):
        assert field.contents() == expected.contents()
        assert (field.types, field.data) == (expected.types, expected.data)
    assert [tensor.name for tensor in own.tensors] == ["plain", "rounded"]
    for tensor, expected in zip(own.tensors, library.tensors, strict=True):
        assert type(tensor.data) is np.ndarray  # the library's are numpy.memmap, which is slow to slice
        assert tensor.tensor_type == expected.tensor_type
        assert tensor.data.dtype == expected.data.dtype
        np.testing.assert_array_equal(tensor.data, expected.data, strict=True)
