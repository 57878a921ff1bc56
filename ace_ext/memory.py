"""Memory: what the process uses, what a run will need, and what it may have."""

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import PruneConfig
from .errors import InputError
from .model_walk import Block
from .scores import MOMENT
from .shards import Shards

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """``2GB``, ``1.5GiB``, ``800MB`` or plain bytes.

    Raises:
        InputError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise InputError(f"max-memory must be a size like 2GB or 1500MiB (got {text!r})")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def resident_bytes() -> int:
    """The process's resident memory now; 0 where the system does not tell."""
    return _status("VmRSS:")


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The process's peak resident memory, or on a GPU the most that torch allocated there."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not rusage where there is a choice: a child process starts with its parent's peak there.
    peak = _status("VmHWM:")
    if peak:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes but on macOS


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Starts the peak anew from what is used now; False where the system has no way to."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def available_bytes() -> int:
    """Memory that the system can give, the control group's limit included; a large number where it does not tell."""
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
            # Files that were read lately count as used there, but make room for whoever asks.
            taken = int((group / used).read_text()) - int(counts[cache])
            found.append(int((group / limit).read_text()) - taken)
    return max(0, min(found, default=2**62))


def _status(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run holds at its peak, by what holds them."""

    process: int  # the interpreter and its libraries, as measured before the model was loaded
    model: int  # weights that are held at once: all of them; with offload one block's, or what is before them and one
    hidden: int  # hidden states that stay in memory
    forward: int  # activations of one batch in one block
    statistics: int  # of one block's Linears (group model: of all), their probes and cross moments included

    @property
    def total(self) -> int:
        return self.process + self.model + self.hidden + self.forward + self.statistics

    def describe(self) -> str:
        """The parts that count, largest first."""
        parts = {name: size for name, size in vars(self).items() if size >= 2**20}
        return ", ".join(f"{n} {s / 1e9:.2f} GB" for n, s in sorted(parts.items(), key=lambda part: -part[1]))


def estimate(
    blocks: list[Block],
    shards: Shards | None,
    config: PruneConfig,
    nsamples: int,
    seqlen: int,
    *,
    process: int,
    model_bytes: int,
    head_bytes: int = 0,
    offload: bool,
    resident_hidden: bool = True,
) -> Estimate:
    """What a run will hold at its peak, from shapes alone.

    Args:
        blocks: of the model or its skeleton.
        shards: its files, None where it was loaded from others.
        process: what the process takes without the model.
        model_bytes: of all parameters.
        head_bytes: of an LM head of its own, which stays in its file with ``offload``.
    """
    itemsize = _itemsize(blocks, shards)
    per_block = [sum(p.numel() for p in block.module.parameters()) * itemsize for block in blocks]
    linears = [linear for block in blocks for linear in block.linears.values()]
    moments = [sum(linear.weight.numel() for linear in block.linears.values()) * 4 for block in blocks]
    width = max(linear.in_features for linear in linears)
    widest = max(max(linear.weight.shape) for linear in linears)
    hidden_width = linears[0].in_features
    tokens = nsamples * seqlen
    batch = min(tokens, max(seqlen, config.batch_tokens // seqlen * seqlen))
    # With offload, the parts before the blocks are let go before the second one.
    offloaded = max(max(per_block), model_bytes - head_bytes - sum(per_block) + per_block[0])
    count = len(linears) if config.group == "model" else max(len(block.linears) for block in blocks)
    moment = sum(moments) if config.group == "model" else max(moments)
    return Estimate(
        process=process,
        model=offloaded if offload else model_bytes,
        hidden=tokens * hidden_width * itemsize if resident_hidden else 0,
        forward=batch * (4 * hidden_width + 4 * widest) * itemsize,
        statistics=count * (6 * 8 * width + 128 * width * itemsize) + (moment if MOMENT in config.needs else 0),
    )


def _itemsize(blocks: list[Block], shards: Shards | None) -> int:
    name, linear = next((block.full_name(child), linear) for block in blocks for child, linear in block.linears.items())
    dtype = shards.entries[f"{name}.weight"].dtype if shards is not None else linear.weight.dtype
    return dtype.itemsize
