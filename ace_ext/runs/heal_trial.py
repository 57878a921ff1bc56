"""A trial that measures how long the steps of a distillation take: for ``ace-prune heal --minutes``, and for a plan."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ace_ext.healing.batches import Placement, enter
from ace_ext.healing.loss import divergence_and_gradient
from ace_ext.healing.part import CHECKS
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.shared_states import SharedStates
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models._transformers import embedding_weight
from ace_ext.models.block_store import OffloadedBlocks
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.models.tail import Tail
from ace_ext.runs.dry_run import RandomWeights
from ace_ext.runs.model_source import Source


@dataclass(frozen=True)
class StepTrial:
    """What a trial measured, in seconds."""

    step: float
    """Of one step, including the dense model's forward pass for its tokens."""
    measuring: float
    """Of all measurements on held-out text."""

    def seconds(self, steps: int) -> float:
        """Of a distillation with this many steps."""
        return self.measuring + steps * self.step


def try_step(source: Source, settings: HealSettings, seqlen: int, device: torch.device) -> StepTrial:
    """Measures one step of the first block and of the loss, with random tokens; all blocks are assumed to be as fast.

    Blocks are assumed to be trained all together, without stored activations. Without safetensors files, random weights
    are used.
    """
    rows = max(1, settings.step_tokens // seqlen)
    tokens = torch.randint(0, len(embedding_weight(source.model)), (rows, seqlen))
    files: Any = source.files.shards or RandomWeights(source.model)  # blocks are only read from it
    store = OffloadedBlocks(source.blocks, files, device)
    with torch.no_grad():
        calls, states = enter(source.model, store, [tokens], Placement(device=device), "trial")
        index = next(i for i, block in enumerate(source.blocks) if block.linears)
        forward, step = _block_seconds(store, index, calls[0], states[0])
        with store.way_out(source.model):
            loss = _loss_seconds(Tail(source.model, source.blocks, calls[0].wrap), states[0])
    blocks = len(source.blocks)
    held_out = max(1, settings.held_out // rows)
    measuring = (CHECKS + 1) * held_out * (blocks * forward + loss)
    return StepTrial(blocks * (forward + step) + loss + blocks * forward / settings.passes, measuring)


def tokens_within(seconds: float, source: Source, settings: HealSettings, seqlen: int, device: torch.device) -> int:
    """How many tokens can be trained on within about this time, at least those of one step."""
    trial = try_step(source, settings, seqlen, device)
    steps = max(1, int((seconds - trial.measuring) / trial.step))
    return steps * max(1, settings.step_tokens // seqlen) * seqlen


def _block_seconds(store: OffloadedBlocks, index: int, call: BlockCall, hidden: Tensor) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and backward pass with Adam. The second of two tries counts, because
    the first one includes loading of libraries."""
    forward = step = 0.0
    with store.loaded(index) as block:
        trainer = BlockTrainer(block)
        with trainer.gradients():
            for _ in range(2):
                start = time.perf_counter()
                run_block(block, hidden, call.others[index])
                forward = time.perf_counter() - start
                x, shared = hidden.detach().requires_grad_(True), SharedStates(call)
                with torch.enable_grad():
                    output = shared.run(block, index, x)
                trainer.backward(x, partial(shared.gradients, index, output, torch.ones_like(output)))
                trainer.step_(0.0)
                step = time.perf_counter() - start - forward
    return forward, step


def _loss_seconds(tail: Tail, hidden: Tensor) -> float:
    start = time.perf_counter()
    divergence_and_gradient(tail, hidden, hidden)
    return time.perf_counter() - start
