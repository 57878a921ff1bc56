"""Training of one pruned block: its remaining weights and its norms are trained to reproduce the dense block's output.

Masks stay fixed. Some samples are only measured, and the weights with the lowest loss on them are kept.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.models.fused_weights import fused_parameters
from ace_ext.models.replay import run_block, token_rows
from ace_ext.models.samples import of_samples
from ace_ext.pruning.trained_weight import TrainedWeight
from ace_ext.records import Tuning

SEED = 0
"""Seed of the order of the steps in an epoch."""
BACK_OFF = 0.3
"""What the learning rate is multiplied by after an epoch that did not lower the loss on the held-out samples."""
TINY = torch.finfo(torch.float32).tiny
LEAST_SHARE = 1e-6
"""The least share of a channel in a target's square, relative to the mean channel: a channel of zeros has no weight of
infinity."""
CHUNK_TOKENS = 256
"""Tokens whose squares are in memory at a time while channels are measured."""

Others = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's arguments other than the hidden states: positional and keyword."""


@dataclass(frozen=True)
class Training:
    """How a block is trained."""

    epochs: int
    """Passes over the samples that are trained on."""
    learning_rate: float
    """Adam's, at the first step, as a share of the root mean square of each parameter's entries
    (:func:`ace_ext.pruning.trained_weight.root_mean_square`). So a vector of zeros stays one."""
    step_tokens: int
    """About as many tokens are in a gradient step; but at least one sample."""
    held_out: float
    """The share of the samples that are only measured; 0: all samples are trained on, and measured."""

    def step_samples(self, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens one gradient step takes."""
        return max(1, self.step_tokens // seqlen)

    def trained_samples(self, samples: int) -> int:
        """How many of the samples are trained on: at least one. The others are the last ones."""
        return max(1, samples - math.ceil(self.held_out * samples))


def train_block_(
    block: Block,
    inputs: Sequence[tuple[Tensor, Others]],
    targets: Sequence[Tensor],
    masks: dict[str, Tensor],
    token_masks: Sequence[Tensor | None] | None = None,
    *,
    training: Training,
    grid: Grid | None = None,
    sample_shapes: Any = None,
) -> Tuning:
    """Trains a pruned block in place on the calibration tokens with Adam.

    The loss of a token is ``Σ_c w_c (output - target)_c² / Σ_c w_c (target - input)_c²``: the squared error relative to
    what the dense block adds to its input. The weight ``w_c`` of a channel is the inverse of its share of a target's
    square (:func:`channel_weights`): later norms scale large channels down.

    Weights are kept in float32 while they are trained and rounded to the model's dtype, or to their grid, for each
    forward; pruned ones stay +0.0. Learning rates fall linearly to zero.

    The loss on the samples that are held out is measured at the start and after each epoch. If it did not fall, the
    best weights so far are put back, and training goes on with ``BACK_OFF`` of the rate. So the weights of the result
    are the best ones, in the model's dtype. They may be those of the start.

    Args:
        block: a pruned block. Trained are the weights and biases of ``block.linears`` and all one-dimensional
            parameters of other modules (the norms). A Linear that ``skip`` leaves out is not trained.
        inputs: for each calibration batch the block's hidden states ``[batch, seqlen, d]`` and its other arguments, as
            in :class:`ace_ext.models.replay.BlockCall`. Batches are split along ``batch`` into steps. States of images
            may have more dimensions, and fewer tokens and other channels after the block.
        targets: for each batch the dense block's output, likewise.
        masks: for each of ``block.linears`` ``[rows, cols]`` bool, True where a weight is kept.
        token_masks: for each batch ``[batch * seqlen]`` bool, True where a token counts, or None where all do.
        training: how.
        grid: Linears whose weights are on this grid stay on it, and all their zeros stay zeros; None: there is none.
        sample_shapes: of the block's other arguments with one sample (:mod:`ace_ext.models.samples`).

    Returns:
        The mean loss of a token that is held out, before and after, and the epoch with the best weights.
    """
    token_masks = token_masks or [None] * len(inputs)
    targets = [token_rows(block.module, target) for target in targets]
    channels = channel_weights(targets, token_masks)
    steps, held = _divided(block, inputs, targets, token_masks, channels, training, sample_shapes)
    trained = _trained_weights(block, masks, grid)
    with torch.enable_grad(), _only_gradients_of(block.module, [each.weight for each in trained]):
        return _Trainer(block, steps, held or steps, trained).train_(training)


def channel_weights(targets: Sequence[Tensor], token_masks: Sequence[Tensor | None]) -> Tensor:
    """The weight of each channel in the loss, ``[d]`` float32: ``1 / (d · mean_t target_tc² / ‖target_t‖²)``. It is 1
    where all channels are the same size.

    Some models have a few channels that are much larger than all others. Unweighted, the loss would be the error of
    these. Each token counts the same, also the first one, which may be much larger than all others. ``targets`` are
    ``[batch, seqlen, d]``, ``token_masks`` as for :func:`train_block_`.
    """
    width = targets[0].shape[-1]
    total = torch.zeros(width, dtype=torch.float32, device=targets[0].device)
    tokens = 0
    for target, token_mask in zip(targets, token_masks, strict=True):
        rows = target.flatten(0, 1)
        for part in _slices(0, len(rows), CHUNK_TOKENS):
            square = rows[part].float().square()
            if token_mask is not None:
                square *= token_mask[part].unsqueeze(1).to(square.device)
            total += (square / square.sum(1, keepdim=True).clamp_min(TINY)).sum(0)
            tokens += len(square) if token_mask is None else int(token_mask[part].count_nonzero())
    return 1 / (width * total / max(1, tokens)).clamp_min(LEAST_SHARE)


class _Step:
    """One gradient step: some samples of a batch."""

    def __init__(
        self, block: Block, hidden: Tensor, others: Others, target: Tensor, token_mask: Tensor | None, channels: Tensor
    ) -> None:
        self.hidden, self.others, self.target, self._channels = hidden, others, target, channels
        given, added = token_rows(block.module, hidden), target.float()
        if given.shape == target.shape:  # else the block has another number of tokens or channels
            added = added - given.float()
        share = (added.square() * channels).sum(-1)  # [batch, seqlen]
        self.token_weight = 1 / share.clamp_min(TINY)
        if token_mask is not None:
            self.token_weight = self.token_weight.masked_fill(~token_mask.to(share.device).view_as(share), 0.0)
        self.tokens = int(self.token_weight.count_nonzero())

    def loss(self, block: Block) -> Tensor:
        """The loss summed over tokens, not averaged: Adam does not depend on the scale, and a sum keeps float16
        gradients from underflowing."""
        output = run_block(block, self.hidden, self.others)
        error = token_rows(block.module, output).float() - self.target.float()
        return ((error.square() * self._channels).sum(-1) * self.token_weight).sum()


def _divided(
    block: Block,
    inputs: Sequence[tuple[Tensor, Others]],
    targets: Sequence[Tensor],
    token_masks: Sequence[Tensor | None],
    channels: Tensor,
    training: Training,
    sample_shapes: Any = None,
) -> tuple[list[_Step], list[_Step]]:
    """The steps to train on, and those that are held out."""
    samples = sum(len(hidden) for hidden, _ in inputs)
    left = training.trained_samples(samples)
    trained: list[_Step] = []
    held: list[_Step] = []
    for (hidden, others), target, token_mask in zip(inputs, targets, token_masks, strict=True):
        batch, seqlen = target.shape[:2]
        mask = None if token_mask is None else token_mask.view(batch, seqlen)
        edge = min(left, batch)
        left -= edge
        for steps, start, end in ((trained, 0, edge), (held, edge, batch)):
            for part in _slices(start, end, training.step_samples(seqlen)):
                part_mask = None if mask is None else mask[part]
                given = of_samples(others, batch, part, sample_shapes)
                steps.append(_Step(block, hidden[part], given, target[part], part_mask, channels))
    return trained, held


def _slices(start: int, end: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, end)) for at in range(start, end, step))


def _trained_weights(block: Block, masks: dict[str, Tensor], grid: Grid | None) -> list[TrainedWeight]:
    """Everything that is trained: matrices with their masks, biases and norms."""
    chosen: list[TrainedWeight] = []
    for child, linear in block.linears.items():
        seed = zlib.crc32(block.full_name(child).encode())
        chosen.append(TrainedWeight(linear.weight, masks[child], grid, seed))
        if linear.bias is not None:
            chosen.append(TrainedWeight(linear.bias))
    transposed = ((path, owner) for owner, path, _, layout in fused_parameters(block.module) if not layout.routed)
    skipped = {owner for path, owner in transposed if path not in block.linears}
    for module in block.module.modules():
        if not isinstance(module, nn.Linear) and module not in skipped:
            chosen.extend(TrainedWeight(p) for p in module.parameters(recurse=False) if p.dim() == 1)
    return chosen


@contextmanager
def _only_gradients_of(module: nn.Module, parameters: list[Tensor]) -> Iterator[None]:
    """Only these parameters require gradients inside the context; afterwards ``requires_grad`` is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in (*module.parameters(), *parameters)]
    try:
        module.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@torch.no_grad()
def _mean_loss(block: Block, steps: list[_Step]) -> float:
    total = sum(float(step.loss(block)) for step in steps)
    return total / max(1, sum(step.tokens for step in steps))


class _Trainer:
    """The training of one block.

    Args:
        block: the block.
        steps: to train on.
        held: to measure.
        trained: what is trained; its parameters require gradients.
    """

    def __init__(self, block: Block, steps: list[_Step], held: list[_Step], trained: list[TrainedWeight]) -> None:
        self._block, self._steps, self._held, self._trained = block, steps, held, trained
        self._best = [each.weight.detach().clone() for each in trained]

    def train_(self, training: Training) -> Tuning:
        """Trains, and leaves the best weights in the block."""
        rates = [training.learning_rate * each.size for each in self._trained]
        groups = [{"params": [each.master], "lr": rate} for each, rate in zip(self._trained, rates, strict=True)]
        adam = torch.optim.Adam(groups, fused=True)  # one pass over memory, without temporary copies
        share, total = 1.0, training.epochs * len(self._steps)
        order = torch.Generator().manual_seed(SEED)
        before = best = _mean_loss(self._block, self._held)
        kept = 0
        for epoch in range(training.epochs):
            for place, index in enumerate(torch.randperm(len(self._steps), generator=order).tolist()):
                left = share * (1 - (epoch * len(self._steps) + place) / total)
                for group, rate in zip(adam.param_groups, rates, strict=True):
                    group["lr"] = left * rate
                self._step_(adam, self._steps[index])
            loss = _mean_loss(self._block, self._held)
            if loss < best:  # False for NaN
                best, kept = loss, epoch + 1
                _write_(self._best, [each.weight for each in self._trained])
            else:
                share *= BACK_OFF
                for each, values in zip(self._trained, self._best, strict=True):
                    each.restart_(values)
                adam.state.clear()  # its moments may hold NaN
        _write_([each.weight for each in self._trained], self._best)
        return Tuning(before, best, kept)

    def _step_(self, adam: torch.optim.Adam, step: _Step) -> None:
        weights = [each.weight for each in self._trained]
        gradients = list(torch.autograd.grad(step.loss(self._block), weights, allow_unused=True))
        for each in self._trained:
            each.take(gradients.pop(0))  # freed one by one, so float32 copies of all never exist at once
        adam.step()
        adam.zero_grad()
        for each in self._trained:
            each.write_()


@torch.no_grad()
def _write_(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
