"""Memory: what the process uses, what a run will need, and what it may have."""

import contextlib
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .config import PruneConfig
from .errors import InputError
from .model_walk import Block
from .scores import MOMENT
from .shards import Shards
from .statistics import StatisticsCollector

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
    """Bytes that a run holds at the peak of one of its phases, by what holds them."""

    process: int  # the interpreter, its libraries, tokenizer and calibration text
    model: int  # weights: all that the run touches, or with offload one block's and, at the entrance, what is before it
    hidden: int = 0  # hidden states that stay in memory
    forward: int = 0  # activations of one batch in one block
    statistics: int = 0  # of the Linears that are looked at together, their probes included
    solver: int = 0  # what the largest Linear needs of the size of a matrix
    transient: int = 0  # what loading or reading text holds for a moment
    phase: str = "prune"

    @property
    def total(self) -> int:
        return self.process + self.model + self.hidden + self.forward + self.statistics + self.solver + self.transient

    def parts(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name != "phase"}

    def describe(self) -> str:
        """The parts that count, largest first."""
        parts = {name: size for name, size in self.parts().items() if size >= 2**20}
        return ", ".join(f"{n} {s / 1e9:.2f} GB" for n, s in sorted(parts.items(), key=lambda part: -part[1]))


def estimate(
    model: nn.Module,
    blocks: list[Block],
    shards: Shards | None,
    config: PruneConfig,
    nsamples: int,
    seqlen: int,
    *,
    offload: bool,
    resident_hidden: bool = True,
    whole: bool = False,
    process: int | None = None,
    device: torch.device | str = "cpu",
) -> Estimate:
    """What a run holds at its peak, from shapes alone: entering the first block or pruning, whichever holds more.

    Args:
        model: loaded, or its skeleton with the dtypes that it will have.
        blocks: its blocks.
        shards: its files where the weights are used as they lie there, mapped into memory; else None.
        offload: one block at a time is in memory.
        resident_hidden: all hidden states are.
        whole: every weight is touched, as when the model writes its own calibration text.
        process: bytes beside the model; None: from what this process holds now.
        device: where the peak is asked for.
    """
    shape = _Shape.of(model, blocks)
    tokens = nsamples * seqlen
    batch = min(tokens, max(seqlen, config.batch_tokens // seqlen * seqlen))
    mapped = shards is not None and not whole and torch.device(device).type == "cpu"
    outside = shape.embedding + (0 if mapped or offload else shape.head)
    if mapped and not offload:  # a mapped file's pages are read around the rows that tokens ask for
        outside = min(outside, tokens * _FAULT_AROUND)
    loaded = not next(blocks[0].module.parameters()).is_meta
    resident = sum(shape.blocks) + outside
    if process is None:
        process = _process_bytes(resident if loaded else 0, text_to_come=not (loaded or offload), device=device)
    hidden = tokens * shape.hidden * shape.itemsize if resident_hidden else 0
    forward = shape.forward_bytes(batch, seqlen, config)
    counted = blocks if config.group == "model" else [max(blocks, key=lambda block: len(block.linears))]
    linears = [linear for block in counted for linear in block.linears.values()]
    prune = Estimate(
        process=process,
        model=max(shape.blocks) if offload else resident,
        hidden=hidden,
        forward=forward,
        statistics=sum(_statistics_bytes(linear, config, tokens) for linear in linears),
        solver=max(solver_bytes(config, *linear.weight.shape) for block in blocks for linear in block.linears.values()),
    )
    if not offload:
        return prune
    # The first batch runs through a block before the later ones' states are there.
    enter = Estimate(process, max(shape.blocks) + outside, max(0, hidden - forward), forward, phase="enter")
    return max(prune, enter, key=lambda e: e.total)


def solver_bytes(config: PruneConfig, rows: int, cols: int) -> int:
    """What pruning one matrix holds for a while beside its weights and statistics: a mask of its zeros, a byte each, a
    callable's scores, and a solver's Gram matrix with its float64 factors and float32 copies of the weight.
    """
    scores = 4 * rows * cols if callable(config.metric) else 0
    solver = 32 * cols * cols + 28 * rows * cols if config.solver else 0
    return rows * cols + scores + solver


_FAULT_AROUND = 2**16
"""Bytes of a mapped file that Linux brings in for one page that is touched."""

_FORWARD_LIBRARIES = 110 * 10**6
"""Measured: what the process grows by, for good, in its first forward pass (oneDNN's kernels, torch's code)."""

_TOKENIZER_AND_TEXT = 150 * 10**6
"""Measured on wiki-mini with a vocabulary of 49 152: what it grows by for good while it draws calibration text."""


def _process_bytes(weights: int, text_to_come: bool, device: torch.device | str) -> int:
    """What the process will hold beside the model, from what it holds now with ``weights`` bytes of the model."""
    if torch.device(device).type == "cuda":
        return 0
    later = _FORWARD_LIBRARIES + (_TOKENIZER_AND_TEXT if text_to_come else 0)
    return max(0, resident_bytes() - weights) + later


def _statistics_bytes(linear: nn.Linear, config: PruneConfig, tokens: int) -> int:
    """Bytes of one Linear's statistics: two float64 vectors a state, the float32 cross moment, and the probe: rows of
    its input, of its dense output, and of both outputs in float32."""
    rows, cols = linear.weight.shape
    moment = 4 * rows * cols if MOMENT in config.needs else 0
    probes = min(tokens, StatisticsCollector.PROBE_TOKENS) * (
        cols * linear.weight.dtype.itemsize + rows * (linear.weight.dtype.itemsize + 8)
    )
    return 2 * 8 * cols * len(config.needs - {MOMENT}) + moment + probes


@dataclass(frozen=True)
class _Shape:
    """The sizes that an estimate is computed from."""

    blocks: list[int]  # bytes of each block's parameters
    embedding: int  # bytes of parameters outside the blocks, an untied head's not counted
    head: int  # bytes of an untied head
    hidden: int  # width of the hidden states
    widest: int  # largest side of a Linear in a block
    heads: int  # attention heads whose scores are stored; 0 where attention is fused
    itemsize: int

    @classmethod
    def of(cls, model: nn.Module, blocks: list[Block]) -> "_Shape":
        sizes = [sum(p.nbytes for p in block.module.parameters()) for block in blocks]
        head, entrance = model.get_output_embeddings(), model.get_input_embeddings()
        untied = head is not None and head.weight is not entrance.weight
        head_bytes = sum(p.nbytes for p in head.parameters()) if untied else 0
        linears = [linear for block in blocks for linear in block.linears.values()]
        text = model.config.get_text_config()
        return cls(
            blocks=sizes,
            embedding=sum(p.nbytes for p in model.parameters()) - sum(sizes) - head_bytes,
            head=head_bytes,
            hidden=text.hidden_size,
            widest=max(max(linear.weight.shape) for linear in linears),
            heads=text.num_attention_heads if model.config._attn_implementation == "eager" else 0,
            itemsize=linears[0].weight.dtype.itemsize,
        )

    def forward_bytes(self, tokens: int, seqlen: int, config: PruneConfig) -> int:
        """The most that is alive at a time for one batch in a block.

        - attention: residual and norm, then queries, keys and values before and after rotation (6 hidden widths);
        - a norm: residual, and three float32 copies;
        - MLP: residual and norm, then gate, up and their product, each as wide as the widest Linear.
        """
        attention = tokens * (8 * self.hidden * self.itemsize + self.heads * seqlen * (4 + 2 * self.itemsize))
        norm = tokens * (2 * self.itemsize + 12) * self.hidden
        mlp = tokens * (2 * self.hidden + 3 * self.widest) * self.itemsize
        # The cross moment squares at most 2048 tokens at a time, in float32.
        squares = 8 * min(tokens, 2048) * self.widest if MOMENT in config.needs else 0
        return max(attention, norm, mlp) + squares
