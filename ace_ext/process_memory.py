"""The memory that this process uses, its peak, and the memory that is still available."""

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

from ace_ext.errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_M_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's ``malloc.h``."""


def parse_bytes(text: str) -> int:
    """The number of bytes of a text like ``2GB``, ``1.5GiB``, ``800MB`` or ``4000000``.

    Raises:
        InputError: the text is none of these, or is a number below a mebibyte without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"max-memory must be a size like 2GB or 1500MiB (got {text!r})")
    size, unit = float(match[1]), (match[2] or "").upper()
    if not unit and size < 2**20:
        raise InputError(f"max-memory without a unit is a number of bytes (got {text!r}); did you mean {match[1]}GB?")
    return int(size * _UNITS[unit])


def resident_bytes(process: int | None = None) -> int:
    """The present resident memory of a process in bytes, by default of this one; 0 if the system does not report it."""
    return _status("VmRSS:", process)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The peak resident memory of the process in bytes; for a GPU the most that torch allocated there."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Tried before getrusage: there a child process starts with the peak of its parent.
    peak = _status("VmHWM:")
    if peak:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in kibibytes, on macOS in bytes


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Resets the peak to the present memory; False if the system cannot."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def return_freed_memory() -> None:
    """From now on, freed tensors of 4 MiB and more return their memory to the system.

    By default glibc raises this threshold up to 32 MiB as tensors are freed. The process then keeps an amount of freed
    memory that differs from run to run: measured 560 to 580 MiB instead of 500 for matrices of 5 to 13 MB. For these,
    page faults cost a fifth more CPU time; tensors above 32 MiB cause them anyway. There is no effect with other C
    libraries.
    """
    with contextlib.suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**22)


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Available bytes of a GPU, or of the system within the limit of the control group; 2**62 if they are unknown."""
    device = torch.device(device)
    if device.type == "cuda":  # torch keeps freed memory, which is available too
        return int(torch.cuda.mem_get_info(device)[0] + _kept_by_torch(device))
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            counts = dict(line.split() for line in (group / stat).read_text().splitlines())
            # Cached files count as used there, but the system drops them if it needs memory.
            taken = int((group / used).read_text()) - int(counts[cache])
            found.append(int((group / limit).read_text()) - taken)
    return max(0, min(found, default=2**62))


def _kept_by_torch(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _status(key: str, process: int | None = None) -> int:
    """A value of ``/proc/PROCESS/status`` in bytes, by default of this process; 0 if the file does not have it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process or 'self'}/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0
