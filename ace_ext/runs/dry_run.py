"""A trial for ``ace-prune plan``: prunes one block with a few tokens, to measure how long a block takes and how often
batches pass through it. If the model has no safetensors files, random weights are used.
"""

import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.engine.batch_states import BatchStates
from ace_ext.engine.context import RunContext
from ace_ext.engine.strategies.in_lockstep import InLockstep
from ace_ext.engine.walk import Walk
from ace_ext.models.block_store import OffloadedBlocks, ResidentBlocks
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, capture_calls, run_block
from ace_ext.models.trial import calls_in, try_walk
from ace_ext.models.whole_forward import takes_tokens
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport
from ace_ext.runs.model_source import Source


@dataclass(frozen=True)
class Trial:
    """What the trial measured."""

    fixed_seconds: float  # per block, independent of the tokens: pruning and its checks, without reading files
    token_seconds: float  # per calibration token and block
    step_seconds: float  # forward of a few tokens through one block; dominated by reading its weights from memory
    forward_seconds: float  # per token and block, of a forward of more tokens
    passes: int  # how often each batch goes through a block


class RandomWeights:
    """Random weights with the interface of :class:`Shards`, in the shapes and dtypes of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def stored_name(self, names: Iterable[str]) -> str | None:
        """The first of a parameter's names that the model has; None if it has none."""
        return next((name for name in names if name in self), None)

    def read(self, name: str) -> Tensor:
        """Random values in the parameter's shape and dtype, the same each time: a model that is run twice must not
        differ from itself."""
        parameter, random = self._parameters[name], torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(parameter.shape, generator=random).mul_(0.02).to(parameter.dtype)


LARGE_BLOCK = 2**24
"""Weights of a block from which on its trial takes long. A smaller one is pruned once more before, so that what
libraries do at their first call is not measured."""


@dataclass(frozen=True)
class _Timed:
    """What one pruning of the block took."""

    tokens: int
    seconds: float
    forward_tokens: int
    forward_seconds: float  # of a forward after it


@torch.no_grad()
def try_block(
    source: Source, tokens: Tensor, config: PruneConfig, device: torch.device, *, keeps_forwards: bool
) -> Trial:
    """Prunes the first block that has Linears with a few of the tokens, and with fewer.

    Args:
        source: a skeleton; its block has weights only during the trial.
        tokens: ``[nsamples, seqlen]`` calibration tokens.
        config: as for the run.
        device: as for the run.
        keeps_forwards: as for the run: whether several batches are pruned in lockstep.
    """
    model, blocks, files = source.model, source.blocks, _files(source)
    index = next(i for i, block in enumerate(blocks) if block.linears)
    several = config.batch_samples(tokens.shape[1]) < len(tokens)  # several batches are pruned in steps
    large = tokens[: 8 if several else 4]
    parts = min(4 if several else 1, len(large))
    small = large[: 2 if several else 1, : max(2, tokens.shape[1] // 4)]
    trials = [large, small] if size_of(blocks[index]) >= LARGE_BLOCK else [small, large, small]
    offloaded = OffloadedBlocks([blocks[index]], files, device)
    first = OffloadedBlocks(blocks, files, device)
    context = RunContext(device=device, keeps_forwards=keeps_forwards)
    found: list[_Timed] = []
    with first.entrance(model), takes_tokens(model):
        batches = [[{"input_ids": batch.to(device)} for batch in part.chunk(parts)] for part in trials]
        captured = [list(capture_calls(model, blocks, inputs)) for inputs in batches]
    for part, calls in zip(trials, captured, strict=True):
        hidden = HiddenStates([call.hidden for call in calls if call.hidden is not None], device=device)
        calls = [BlockCall(None, [call.others[index]], call.token_mask, call.tokens) for call in calls]
        with offloaded.loaded(0) as block, _Passes(block.module) as passes:
            report = PruneReport(config.to_dict(), str(device), "")
            # A run finds these out beforehand.
            context.uses = {block.name: calls_in(block, hidden[0], calls[0].others[0])}
            walk = Walk(ResidentBlocks([block]), BatchStates(calls, hidden, device), config, report, context)
            if isinstance(walk.strategy, InLockstep):  # a run tries this once, not in each block
                walk.strategy.serves(block, 0)
            passes.count = 0
            start = time.perf_counter()
            walk.run()
            end, count = time.perf_counter(), passes.count
            run_block(block, hidden[0], calls[0].others[0])
            forward = time.perf_counter() - end
            found.append(_Timed(part.numel(), end - start, hidden[0].shape[:2].numel(), forward))
    many, few = found[-2:]
    difference = max(1, many.tokens - few.tokens)  # with only two tokens there is none
    token_seconds = max(0.0, (many.seconds - few.seconds) / difference)
    fixed = max(0.0, many.seconds - token_seconds * many.tokens)
    per_token = many.forward_seconds / many.forward_tokens
    return Trial(fixed, token_seconds, few.forward_seconds, per_token, round(count / len(calls)))


def size_of(block: Block) -> int:
    """The number of its weights."""
    return sum(parameter.numel() for parameter in block.module.parameters())


@torch.no_grad()
def not_walked(source: Source, tokens: Tensor, device: torch.device) -> str | None:
    """Why a run would prune the model by forwards of the whole model; None if it walks it block by block. Reads each
    block once. Arguments as of :func:`try_block`."""
    store = OffloadedBlocks(source.blocks, _files(source), device)
    return try_walk(source.model, store, {"input_ids": tokens[:1].to(device)}).reason


def _files(source: Source) -> Any:
    """What the blocks' weights are read from."""
    shards = source.files.shards
    return RandomWeights(source.model) if shards is None else shards


class _Passes:
    """Context manager that counts a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.count = module, 0

    def __enter__(self) -> "_Passes":
        self._handle = self._module.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self, *_: object) -> None:
        self.count += 1
