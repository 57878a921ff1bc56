"""Training of one pruned block: its remaining weights and its norms are trained to reproduce the dense block's output.

Masks stay fixed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.models.blocks import Block
from ace_ext.models.replay import run_block
from ace_ext.records import Tuning

STEP_TOKENS = 1024
"""Tokens of one gradient step (at least one sample): 8 samples of the default 128 tokens."""
SEED = 0
"""Seed of the order of the steps in an epoch."""

Others = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's arguments other than the hidden states: positional and keyword."""


def step_samples(seqlen: int) -> int:
    """How many samples of ``seqlen`` tokens one gradient step takes."""
    return max(1, STEP_TOKENS // seqlen)


def train_block_(
    block: Block,
    inputs: Sequence[tuple[Tensor, Others]],
    targets: Sequence[Tensor],
    masks: dict[str, Tensor],
    token_masks: Sequence[Tensor | None] | None = None,
    *,
    epochs: int,
    learning_rate: float,
) -> Tuning:
    """Trains a pruned block in place on the calibration tokens with Adam.

    The loss of a token is ``‖output - target‖² / ‖target - input‖²``: the squared error relative to what the dense
    block adds to its input. Weights are kept in float32 while they are trained and rounded to the model's dtype for
    each forward; pruned ones stay +0.0. Learning rates fall linearly to zero. The loss over all tokens is measured
    before and after; if it did not fall, every parameter is restored.

    Args:
        block: a pruned block. Trained are the weights and biases of ``block.linears`` and all one-dimensional
            parameters of other modules (the norms). A Linear that ``skip`` leaves out is not trained.
        inputs: for each calibration batch the block's hidden states ``[batch, seqlen, d]`` and its other arguments, as
            in :class:`ace_ext.models.replay.BlockCall`. Batches are split along ``batch`` into steps of about
            ``STEP_TOKENS`` tokens.
        targets: for each batch the dense block's output ``[batch, seqlen, d]``.
        masks: for each of ``block.linears`` ``[rows, cols]`` bool, True where a weight is kept.
        token_masks: for each batch ``[batch * seqlen]`` bool, True where a token counts, or None where all do.
        epochs: passes over the calibration tokens.
        learning_rate: Adam's, at the first step, as a share of the root mean square of each parameter's entries
            (:func:`root_mean_square`). So a vector of zeros stays one.

    Returns:
        The mean loss of a token before and after.
    """
    steps = list(_steps(inputs, targets, token_masks or [None] * len(inputs)))
    parameters = _trained_parameters(block, masks)
    dense = [parameter.detach().clone() for parameter, _ in parameters]
    with torch.enable_grad(), _only_gradients_of(block.module, [parameter for parameter, _ in parameters]):
        before = _mean_loss(block, steps)
        _train_(block, steps, parameters, epochs, learning_rate)
        after = _mean_loss(block, steps)
    if not after < before:
        _write_(parameters, dense)
        after = before
    return Tuning(before, after)


def root_mean_square(weight: Tensor, mask: Tensor | None = None) -> float:
    """The root mean square of the entries that the mask keeps, or of all. The other entries must be 0.

    Adam changes each weight by about the learning rate, whatever its gradient. To suit more than one model, a learning
    rate must be a share of this size: 0.19 in SmolLM2-135M, 0.04 in gemma-3-270m, 0.015 in Qwen2.5-Coder-0.5B.
    """
    kept = torch.tensor(weight.numel()) if mask is None else mask.count_nonzero()
    return float(torch.linalg.vector_norm(weight) / kept.clamp_min(1).float().sqrt())


class _Step:
    """One gradient step: some samples of a batch."""

    def __init__(self, hidden: Tensor, others: Others, target: Tensor, token_mask: Tensor | None) -> None:
        self.hidden, self.others, self.target = hidden, others, target
        share = (target.float() - hidden.float()).square().sum(-1)  # [batch, seqlen]
        self.token_weight = 1 / share.clamp_min(torch.finfo(torch.float32).tiny)
        if token_mask is not None:
            self.token_weight = self.token_weight.masked_fill(~token_mask.view_as(share), 0.0)
        self.tokens = int(self.token_weight.count_nonzero())

    def loss(self, block: Block) -> Tensor:
        """The loss summed over tokens, not averaged: Adam does not depend on the scale, and a sum keeps float16
        gradients from underflowing."""
        error = run_block(block, self.hidden, self.others).float() - self.target.float()
        return (error.square().sum(-1) * self.token_weight).sum()


def _steps(
    inputs: Sequence[tuple[Tensor, Others]], targets: Sequence[Tensor], token_masks: Sequence[Tensor | None]
) -> Iterator[_Step]:
    for (hidden, others), target, token_mask in zip(inputs, targets, token_masks, strict=True):
        batch, seqlen = hidden.shape[:2]
        samples = step_samples(seqlen)
        for start in range(0, batch, samples):
            part = slice(start, start + samples)
            mask = None if token_mask is None else token_mask.view(batch, seqlen)[part]
            yield _Step(hidden[part], _cut(others, batch, part), target[part], mask)


def _cut(value: Any, batch: int, part: slice) -> Any:
    """A batch's arguments for some of its samples: tensors whose first dimension is the batch are sliced, also inside
    tuples, lists and dicts.

    One-dimensional tensors hold positions, not samples, even where their length equals the batch size.
    """
    if isinstance(value, Tensor):
        return value[part] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, batch, part) for item in value)
    if isinstance(value, dict):
        return {key: _cut(item, batch, part) for key, item in value.items()}
    return value


def _trained_parameters(block: Block, masks: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Each trained parameter with its mask; None for biases and norms."""
    chosen: list[tuple[Tensor, Tensor | None]] = []
    for child, linear in block.linears.items():
        chosen.append((linear.weight, masks[child]))
        if linear.bias is not None:
            chosen.append((linear.bias, None))
    for module in block.module.modules():
        if not isinstance(module, nn.Linear):
            chosen.extend((p, None) for p in module.parameters(recurse=False) if p.dim() == 1)
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


def _train_(
    block: Block,
    steps: list[_Step],
    parameters: list[tuple[Tensor, Tensor | None]],
    epochs: int,
    learning_rate: float,
) -> None:
    trained = [parameter for parameter, _ in parameters]
    masters = [parameter.detach().float().clone() for parameter, _ in parameters]
    sizes = [root_mean_square(master, mask) for master, (_, mask) in zip(masters, parameters, strict=True)]
    groups = [{"params": [master], "lr": learning_rate * size} for master, size in zip(masters, sizes, strict=True)]
    adam = torch.optim.Adam(groups, foreach=False)  # foreach would hold a copy of all at once
    count = epochs * len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / max(1, count))
    order = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for index in torch.randperm(len(steps), generator=order).tolist():
            gradients = list(torch.autograd.grad(steps[index].loss(block), trained, allow_unused=True))
            for master, (_, mask) in zip(masters, parameters, strict=True):
                gradient = gradients.pop(0)  # freed one by one, so float32 copies of all never exist at once
                if gradient is not None and mask is not None:
                    gradient = gradient.masked_fill(~mask, 0.0)
                master.grad = None if gradient is None else gradient.float()
            adam.step()
            schedule.step()
            adam.zero_grad()
            _write_(parameters, masters)


@torch.no_grad()
def _write_(parameters: list[tuple[Tensor, Tensor | None]], values: list[Tensor]) -> None:
    for (parameter, _), value in zip(parameters, values, strict=True):
        parameter.copy_(value)
