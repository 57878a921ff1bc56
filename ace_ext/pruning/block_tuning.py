"""Training of one pruned block: the weights that stay, and the norms, learn to give the dense block's output again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ace_ext.models.blocks import Block
from ace_ext.models.replay import run_block
from ace_ext.records import Tuning

STEP_TOKENS = 1024
"""Tokens of one gradient step, at least one sample: 8 samples of the usual 128."""
SEED = 0
"""Of the order in which the steps of an epoch come."""

Others = tuple[tuple, dict]


def step_samples(seqlen: int) -> int:
    """Samples of one gradient step."""
    return max(1, STEP_TOKENS // seqlen)


def tune_block_(
    block: Block,
    inputs: Sequence[tuple[Tensor, Others]],
    targets: Sequence[Tensor],
    masks: dict[str, Tensor],
    token_masks: Sequence[Tensor | None] | None = None,
    *,
    epochs: int,
    learning_rate: float,
) -> Tuning:
    """Trains a pruned block in place on the calibration tokens, with Adam, for so many passes (``epochs``).

    The loss of a token is ``‖output - target‖² / ‖target - input‖²``: the squared error relative to what the dense
    block adds to its input. Weights are kept in float32 while they are trained and rounded to the model's dtype for
    each forward; pruned ones stay +0.0. The learning rate falls linearly to zero. All is put back if the loss, measured
    over all tokens before and after, did not fall.

    Args:
        block: a pruned block. Trained are the weights and biases of ``block.linears`` and all one-dimensional
            parameters of other modules, the norms'; a Linear that ``skip`` leaves out stays as it is.
        inputs: for each calibration batch the block's hidden states ``[batch, seqlen, d]`` and its other arguments, as
            in :class:`ace_ext.models.replay.BlockCall`. Batches are cut along ``batch`` into steps of about
            ``STEP_TOKENS`` tokens.
        targets: for each batch the dense block's output ``[batch, seqlen, d]``.
        masks: for each of ``block.linears`` ``[rows, cols]`` bool, True where a weight is kept.
        token_masks: for each batch ``[batch * seqlen]`` bool, True where a token counts, or None where all do.

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


class _Step:
    """What one gradient step reads: some samples of a batch."""

    def __init__(self, hidden: Tensor, others: Others, target: Tensor, token_mask: Tensor | None) -> None:
        self.hidden, self.others, self.target = hidden, others, target
        share = (target.float() - hidden.float()).square().sum(-1)  # [batch, seqlen]
        self.token_weight = 1 / share.clamp_min(torch.finfo(torch.float32).tiny)
        if token_mask is not None:
            self.token_weight = self.token_weight.masked_fill(~token_mask.view_as(share), 0.0)
        self.tokens = int(self.token_weight.count_nonzero())

    def loss(self, block: Block) -> Tensor:
        """Summed over tokens: Adam does not see the scale, and float16 gradients do not vanish."""
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


def _cut(value, batch: int, part: slice):
    """A batch's arguments for some of its samples: tensors that start with the batch are cut, nested ones too.

    Tensors of one dimension are positions, not samples, even where there are as many.
    """
    if isinstance(value, Tensor):
        return value[part] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_cut(item, batch, part) for item in value)
    if isinstance(value, dict):
        return {key: _cut(item, batch, part) for key, item in value.items()}
    return value


def _trained_parameters(block: Block, masks: dict[str, Tensor]) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Each trained parameter, and the mask of a weight."""
    chosen: list[tuple[nn.Parameter, Tensor | None]] = []
    for child, linear in block.linears.items():
        chosen.append((linear.weight, masks[child]))
        if linear.bias is not None:
            chosen.append((linear.bias, None))
    for module in block.module.modules():
        if not isinstance(module, nn.Linear):
            chosen.extend((p, None) for p in module.parameters(recurse=False) if p.dim() == 1)
    return chosen


@contextmanager
def _only_gradients_of(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone; which ones had them before is put back."""
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
    parameters: list[tuple[nn.Parameter, Tensor | None]],
    epochs: int,
    learning_rate: float,
) -> None:
    trained = [parameter for parameter, _ in parameters]
    masters = [parameter.detach().float().clone() for parameter, _ in parameters]
    adam = torch.optim.Adam(masters, lr=learning_rate, foreach=False)  # one by one: not a copy of all at a time
    count = epochs * len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda done: 1 - done / max(1, count))
    order = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for index in torch.randperm(len(steps), generator=order).tolist():
            gradients = list(torch.autograd.grad(steps[index].loss(block), trained, allow_unused=True))
            for master, (_, mask) in zip(masters, parameters, strict=True):
                gradient = gradients.pop(0)  # widened one by one, not all twice
                if gradient is not None and mask is not None:
                    gradient = gradient.masked_fill(~mask, 0.0)
                master.grad = None if gradient is None else gradient.float()
            adam.step()
            schedule.step()
            adam.zero_grad()
            _write_(parameters, masters)


@torch.no_grad()
def _write_(parameters: list[tuple[nn.Parameter, Tensor | None]], values: list[Tensor]) -> None:
    for (parameter, _), value in zip(parameters, values, strict=True):
        parameter.copy_(value)
