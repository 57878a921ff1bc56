"""Several processes that prune one model: each has a share of the calibration samples, all derive the same masks."""

import copy
import hashlib
import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace_ext.engine.protocols import Empty, Peers
from ace_ext.errors import InputError
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.statistics import LinearStatistics, MomentState


@dataclass
class Alone:
    """One process: everything is there already."""

    rank: int = 0
    size: int = 1

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        pass

    def check_same(self, weights: list[Tensor], where: str) -> None:
        pass

    def gather(self, value: object) -> list[Any]:
        return [value]

    def wait(self) -> None:
        pass


class Ranks:
    """The processes that ``torchrun`` started, over NCCL on GPUs and gloo on CPUs."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        # Its functions have the group as a default argument. First imported while there is one (loading a model may do
        # so), it holds that for good: the threads outlive close(), and now and then the interpreter's end aborts.
        importlib.import_module("torch.distributed.nn.functional")

        self._dist, self._device = dist, device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts the objects that it gathers; not run on a GPU
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def merge_(self, stats: dict[str, LinearStatistics], names: list[str], empty: Empty) -> None:
        """Every rank's statistics of the named Linears become those of all ranks' tokens, the same bits everywhere.

        States merge by Chan's rule in the order of the ranks; sums (cross moment, Gram matrix) are added up. A Linear
        that saw no token here, as an expert may, takes the others'; ``empty(name)`` makes a state of its shape.
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
        """Which Linears share a state is known only where they were called: where ranks differ, none share."""
        owners: dict[int, tuple[str, str]] = {}
        sharing = [
            owners.setdefault(id(value), (name, kind)) for name in names for kind, value in stats[name].parts().items()
        ]
        if any(other != sharing for other in self.gather(sharing)):
            for name in names:
                stats[name] = copy.deepcopy(stats[name])

    def _merge_value(self, value: MomentState | GramState | Tensor | list[Tensor]) -> None:
        if isinstance(value, MomentState):
            parts = {key: self._all(tensor) for key, tensor in value.tensors().items()}
            total = MomentState(len(value.mean), value.mean.device)
            for rank in range(self.size):
                total.merge_(MomentState.of_tensors({key: tensors[rank] for key, tensors in parts.items()}))
            value.weight_sum, value.mean, value.m2 = total.weight_sum, total.mean, total.m2
        elif isinstance(value, Tensor):
            self._dist.all_reduce(value)  # each part is summed once and handed to all: the same bits everywhere
        elif isinstance(value, list):  # sample rows
            rows = self.gather([part.cpu() for part in value])
            value[:] = [part.to(self._device) for parts in rows for part in parts]
        else:
            self._dist.all_reduce(value.matrix)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._dist.all_gather(parts, tensor.contiguous())
        return parts

    def check_same(self, weights: list[Tensor], where: str) -> None:
        """Asserts by a hash that all ranks hold the same pruned weights.

        Raises:
            InputError: they do not; nothing of this block is written then.
        """
        digest = hashlib.sha256()
        for weight in weights:
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found = self.gather(digest.hexdigest())
        if len(set(found)) > 1:
            raise InputError(f"{where}: the processes derived different masks ({', '.join(h[:8] for h in found)})")

    def gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        self._dist.barrier()

    def close(self) -> None:
        if self._dist.is_initialized():
            self._dist.destroy_process_group()


def launched() -> bool:
    """Whether ``torchrun`` started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def share_of(tokens: Tensor, peers: Peers) -> Tensor:
    """The samples of this rank: every ``size``-th of ``[nsamples, seqlen]``, as evenly as it goes.

    Raises:
        InputError: fewer samples than processes.
    """
    if len(tokens) < peers.size:
        raise InputError(f"nsamples must be at least the number of processes, {peers.size} (got {len(tokens)})")
    return tokens[peers.rank :: peers.size]
