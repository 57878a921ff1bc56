"""Parsing of sizes, and peak memory of the process."""

import platform
import sys

import pytest
import torch
from folders import spawn

from ace_ext import InputError
from ace_ext.process_memory import parse_bytes, peak_memory_bytes, reset_peak, resident_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2000000", 2 * 10**6),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800 mb", 8 * 10**8),
        (" 4kib ", 4096),
        ("1TB", 10**12),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.0GB", "GB", "-1GB", "2 G", "2GBs", "1,5GB", "nan"])
def test_parse_bytes_refuses(text):
    with pytest.raises(InputError, match="max-memory must be a size like 2GB or 1500MiB"):
        parse_bytes(text)


def test_reset_starts_the_peak_anew():
    size = 2**28
    held = torch.ones(size, dtype=torch.uint8)
    high = peak_memory_bytes()
    assert high >= size
    del held
    if not reset_peak():
        pytest.skip("this system cannot reset a process's peak")
    assert peak_memory_bytes() < high - size // 2
    assert resident_bytes() <= peak_memory_bytes() + 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what other C libraries keep is their own affair")
def test_freed_tensors_go_back_to_the_system():
    """Every second of 20 tensors of 8 MiB is freed: without the call, glibc keeps all these holes."""
    kept = {}
    for call in ("pass", "memory.return_freed_memory()"):
        child = spawn([sys.executable, "-c", HOLES.format(call)])
        out, err = child.communicate()
        assert child.returncode == 0, err
        kept[call] = int(out)
    assert kept["pass"] > 150 * 2**20
    assert kept["memory.return_freed_memory()"] < 90 * 2**20


HOLES = """
import torch
from ace_ext import process_memory as memory
torch.ones(2**20), torch.zeros(30 * 2**20, dtype=torch.uint8)  # and glibc now keeps what is smaller than 30 MiB
{}
before = memory.resident_bytes()
tensors = [torch.ones(2**23, dtype=torch.uint8) for _ in range(20)]
del tensors[::2]
print(memory.resident_bytes() - before)
"""
