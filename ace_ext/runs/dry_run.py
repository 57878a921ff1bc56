"""A short walk over one block with the run's own loop, for ``ace-prune plan``: how long a block takes, and how often
batches pass through it. Where the model has no files to read a block from, random weights stand in for it.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ace_ext.engine.context import RunContext
from ace_ext.engine.hidden_states import HiddenStates
from ace_ext.engine.walk import Walk
from ace_ext.models.block_store import OffloadedBlocks, ResidentBlocks
from ace_ext.models.blocks import Block
from ace_ext.models.replay import BlockCall, capture_calls, run_block
from ace_ext.models.safetensors_files import Shards
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport


@dataclass(frozen=True)
class Trial:
    """What the walk over one block told."""

    fixed_seconds: float  # of a block, whatever the number of tokens: pruning and its checks, reading not counted
    token_seconds: float  # of one calibration token in one block
    forward_seconds: float  # of a forward of a few tokens through one block, which takes as long as reading its weights
    passes: int  # how often each batch goes through a block


class RandomWeights:
    """Gives what :class:`Shards` gives, by name, shape and dtype, without a file."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def read(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return torch.randn(parameter.shape).mul_(0.02).to(parameter.dtype)


@torch.no_grad()
def try_block(
    model: nn.Module, blocks: list[Block], shards: Shards | None, tokens: Tensor, config: PruneConfig, device
) -> Trial:
    """Walks over the first block with Linears twice, with a few of the tokens ``[nsamples, seqlen]`` and with fewer.

    Args:
        model: the skeleton; its block has weights while this lasts, and none afterwards.
        shards: its files, None for random weights.
    """
    files = RandomWeights(model) if shards is None else shards
    index = next(i for i, block in enumerate(blocks) if block.linears)
    several = config.batch_samples(tokens.shape[1]) < len(tokens)  # several batches take the loop's way by stages
    large = tokens[: 8 if several else 4]
    small = large[: 2 if several else 1, : max(2, tokens.shape[1] // 4)]
    offloaded = OffloadedBlocks([blocks[index]], files, device)
    first = OffloadedBlocks(blocks, files, device)
    found = []
    # The larger first: it also brings in what the libraries load at their first call.
    for part in (large, small):
        batches = part.chunk(2 if several else 1)
        with first.entrance(model):
            calls = list(capture_calls(model, blocks, [{"input_ids": batch.to(device)} for batch in batches]))
        hidden = HiddenStates([call.hidden for call in calls], device=device)
        calls = [BlockCall(None, [call.others[index]], call.token_mask, call.tokens) for call in calls]
        with offloaded.hold(0) as block, _Passes(block.module) as passes:
            report = PruneReport(config.to_dict(), str(device), "")
            walk = Walk(ResidentBlocks([block]), calls, hidden, config, report, RunContext(device=device))
            start = time.perf_counter()
            walk.run()
            found.append((part.numel(), time.perf_counter() - start))
            start = time.perf_counter()
            run_block(block, hidden[0], calls[0].others[0])
            forward_seconds = time.perf_counter() - start
    model.tie_weights()  # giving the entrance its weights and taking them away tore a tied embedding and head apart
    (many, longer), (few, shorter) = found
    token_seconds = max(0.0, (longer - shorter) / max(1, many - few))  # of two tokens in all there are no fewer
    fixed = max(0.0, longer - token_seconds * many)
    return Trial(fixed, token_seconds, forward_seconds, round((passes.count - 1) / len(calls)))


class _Passes:
    """Counts a module's calls while it lasts."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.count = module, 0

    def __enter__(self) -> "_Passes":
        self._handle = self._module.register_forward_hook(self._note)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()

    def _note(self, *_) -> None:
        self.count += 1
