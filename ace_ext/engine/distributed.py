"""Several processes that prune one model: each has a share of the calibration samples, and all compute the same
masks."""

import copy
import hashlib
import importlib
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ace_ext.engine.protocols import Empty, Peers
from ace_ext.errors import InputError
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.prune_linear import AllRows
from ace_ext.pruning.sketch import SketchState
from ace_ext.pruning.statistics import LinearStatistics, MomentState


@dataclass
class Alone(AllRows):
    """:class:`ace_ext.engine.protocols.Peers` of a single process: nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        """Does nothing: the statistics are complete."""

    def check_same(self, weights: list[Tensor], where: str) -> None:
        """Does nothing: there is no other process to compare with."""

    def gather(self, value: object) -> list[Any]:
        """The value in a list of one."""
        return [value]

    def wait(self) -> None:
        """Does nothing: there is no other process to wait for."""


class Ranks:
    """The processes that ``torchrun`` started, over NCCL on GPUs and gloo on CPUs."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        # The functions of this module have the process group as a default argument. If it were first imported while a
        # group exists (loading a model may import it), it would keep that group alive: its threads would outlive
        # close(), and the interpreter would sometimes abort at exit.
        importlib.import_module("torch.distributed.nn.functional")

        self._dist, self._device = dist, device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL gathers objects on the current device; not tested on a GPU
        if not dist.is_initialized():
            _check_environment()
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        """Makes every rank's statistics of the named Linears those of all ranks' tokens, with the same bits on each.

        States are merged by Chan's rule in the order of the ranks; sums (cross moment, Gram matrix) are added. A Linear
        that saw no token on this rank, as an expert may, starts from ``empty(name)``.
        """
        for name in names:
            if name not in stats:
                stats[name] = empty(name)
        self._agree_on_sharing(stats, names)
        merged: set[int] = set()
        for name in names:
            stats[name].tokens = sum(self.gather(stats[name].tokens))
            for value in stats[name].parts().values():
                if id(value) not in merged:  # Linears of one input share its state
                    merged.add(id(value))
                    self._merge_value(value)

    def _agree_on_sharing(self, stats: dict[str, LinearStatistics], names: list[str]) -> None:
        """Copies shared statistics if the ranks differ in which Linears share them. A rank knows this only for Linears
        that it called."""
        owners: dict[int, tuple[str, str]] = {}
        sharing = [
            owners.setdefault(id(value), (name, kind)) for name in names for kind, value in stats[name].parts().items()
        ]
        if any(other != sharing for other in self.gather(sharing)):
            for name in names:
                stats[name] = copy.deepcopy(stats[name])

    def _merge_value(self, value: MomentState | GramState | SketchState | Tensor | list[Tensor]) -> None:
        if isinstance(value, MomentState):
            parts = {key: self._all(tensor) for key, tensor in value.tensors().items()}
            total = MomentState(len(value.mean), value.mean.device)
            for rank in range(self.size):
                total.merge_(MomentState.of_tensors({key: tensors[rank] for key, tensors in parts.items()}))
            value.weight_sum, value.mean, value.m2 = total.weight_sum, total.mean, total.m2
        elif isinstance(value, Tensor):
            self._dist.all_reduce(value)  # each part is summed by one rank and sent to all: the same bits on each
        elif isinstance(value, list):  # sample rows
            rows = self.gather([part.cpu() for part in value])
            value[:] = [part.to(self._device) for parts in rows for part in parts]
        else:
            known = [exponent for exponent in self.gather(value.scale.exponent) if exponent is not None]
            if known:
                value.raise_scale_(max(known))
            for part in value.sums():
                self._dist.all_reduce(part)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._dist.all_gather(parts, tensor.contiguous())
        return parts

    def rows(self, count: int) -> slice:
        """This rank's rows of a matrix of ``count`` rows; ranks differ by at most one row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """``[count, cols]``, the same on every rank, from each one's ``part [own rows, cols]``."""
        most = -(-count // self.size)  # parts must be of one size to be gathered
        padded = part.new_zeros(most, part.shape[1])
        padded[: len(part)] = part
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return torch.cat([p[: b - a] for p, (a, b) in zip(self._all(padded), pairwise(ends), strict=True)])

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``: in the order of the ranks, with the same bits on each."""
        total = torch.zeros_like(part)
        for other in self._all(part):
            total += other
        return total

    def check_same(self, weights: list[Tensor], where: str) -> None:
        """Checks by hashes, computed where the weights are, that all ranks hold the same pruned weights.

        Raises:
            InputError: they do not; this block is then not written.
        """
        hashes = [hash_of(weight).to(weights[0].device) for weight in weights]
        digest = hashlib.sha256(str(torch.stack(hashes).tolist() if hashes else "").encode())
        found = self.gather(digest.hexdigest())
        if len(set(found)) > 1:
            raise InputError(f"{where}: the processes derived different masks ({', '.join(h[:8] for h in found)})")

    def gather(self, value: object) -> list[Any]:
        """Every rank's value, in the order of the ranks. Values are pickled."""
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns once every rank has called it."""
        self._dist.barrier()

    def close(self) -> None:
        """Leaves the process group."""
        if self._dist.is_initialized():
            self._dist.destroy_process_group()


HASHED_AT_ONCE = 2**23
"""Bytes of a tensor that :func:`hash_of` mixes at a time."""


def hash_of(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bytes and their places: ``[]`` int64, on its device, by integer arithmetic, with the same
    bits on every device.

    Each word of 8 bytes is mixed with its place by the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators"); the hash is the sum of all, modulo 2⁶⁴.
    """
    parts = torch.split(tensor.detach().contiguous().flatten().view(torch.uint8), HASHED_AT_ONCE)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate(parts):
        padded = part.new_zeros(-(-len(part) // 8) * 8)
        padded[: len(part)] = part
        words = padded.view(torch.int64)
        place = torch.arange(len(words), device=tensor.device) + number * (HASHED_AT_ONCE // 8) + 1
        total += _mixed(words ^ _mixed(place * _GOLDEN)).sum()
    return total


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 words; ``>>`` keeps the sign in torch, so the bits that it brings are cleared."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        words = (words ^ ((words >> shift) & (2 ** (64 - shift) - 1))) * factor
    return words


def _check_environment() -> None:
    """Raises :class:`InputError` unless the environment is one that ``torchrun`` makes."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is in the environment and {', '.join(missing)} not; start with torchrun, or unset it"
        )
    if number_of("RANK", 0) >= number_of("WORLD_SIZE", 1):
        raise InputError(f"RANK in the environment must be below WORLD_SIZE (got {os.environ['RANK']}); use torchrun")


def launched() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return number_of("WORLD_SIZE", 1) > 1


def number_of(name: str, default: int) -> int:
    """A number that ``torchrun`` puts into the environment of each process.

    Raises:
        InputError: there is something else.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise InputError(
            f"{name} in the environment must be a number as torchrun sets it (got {text[:100]!r}); unset it"
        )
    return int(text)


def share_of_batches(batches: list[dict[str, Tensor]], peers: Peers) -> list[dict[str, Tensor]]:
    """The batches of this rank: every ``size``-th one, starting at ``rank``.

    Raises:
        InputError: there are fewer batches than processes.
    """
    if len(batches) < peers.size:
        raise InputError(f"calibration must be at least {peers.size} batches, one a process (got {len(batches)})")
    return batches[peers.rank :: peers.size]


def share_of(tokens: Tensor, peers: Peers) -> Tensor:
    """The samples of this rank: every ``size``-th row of ``tokens [nsamples, seqlen]``, starting at ``rank``.

    Raises:
        InputError: there are fewer samples than processes.
    """
    if len(tokens) < peers.size:
        raise InputError(f"nsamples must be at least the number of processes, {peers.size} (got {len(tokens)})")
    return tokens[peers.rank :: peers.size]
