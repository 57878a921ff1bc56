"""Which neurons or heads stay, by the scores of :data:`ace_ext.pruning.removal.SCORES` and of published methods."""

import torch
from torch import Tensor
from torch.nn import functional

from ace_ext.structures.moments import Moments

DAMPING = 0.01
"""Added to the diagonal of the second moments, relative to its mean."""
ROUNDS = 48
"""About the number of steps in which ``obs`` removes neurons."""
COUPLED = 0.5
"""Neurons with a higher partial correlation are not removed in the same step."""


def kept_units(
    score: str, kept: int, weight: Tensor, moments: Moments, turned: Tensor | None, width: int = 1
) -> Tensor:
    """The units that stay: ``[kept]`` int64, ascending.

    Args:
        score: a name of :data:`ace_ext.pruning.removal.SCORES` or :data:`ace_ext.pruning.removal.PUBLISHED`.
        kept: how many stay.
        weight: the matrix that reads the units, ``[d_out, units * width]`` float32.
        moments: of its inputs over all calibration tokens.
        turned: ``[units]``, the sums of :func:`turning`, which only ``cosine`` reads.
        width: columns of a unit.
    """
    if score in ("obs", "published-osscar"):
        gram = moments.gram / moments.weight
        return greedy(weight, gram, kept) if width == 1 else greedy_groups(weight, gram, kept, width)
    if score == "cosine":
        assert turned is not None  # collected for this score
        scores = turned
    elif score == "published-wanda-sp":
        scores = (weight.abs().sum(0) * moments.gram.diagonal().sqrt()).view(-1, width).sum(1)
    else:
        mean = moments.total / moments.weight
        variance = moments.gram.diagonal() / moments.weight - mean.square()
        columns = variance * weight.square().sum(0)
        if score == "published-flap" and width > 1:  # FLAP squares the scores of columns of heads
            columns = columns.square()
        scores = columns.view(-1, width).sum(1)
    return scores.sort(descending=True, stable=True).indices[:kept].sort().values


def greedy(weight: Tensor, gram: Tensor, kept: int, rounds: int = ROUNDS) -> Tensor:
    """Removes the neurons with the lowest ``‖W_j‖² / (C⁻¹)_jj`` in ``rounds`` steps: ``[kept]`` int64, ascending.

    After each step ``W`` is the least-squares matrix on the remaining neurons, and ``C⁻¹`` that of their second moments
    (ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983).

    Args:
        weight: ``W [d_out, neurons]``.
        gram: ``C [neurons, neurons]``, the mean of ``h hᵀ``.
        kept: how many stay.
        rounds: the number of steps.
    """
    w, inverse = weight.double(), _inverse(gram)
    left = torch.arange(len(inverse), device=inverse.device)
    step = max(1, -(-(len(left) - kept) // rounds))
    while len(left) > kept:
        count = min(step, len(left) - kept)
        scores = w.square().sum(0) / inverse.diagonal()
        gone = _uncoupled(scores.sort(stable=True).indices[: 2 * count], inverse, count)
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill_(0, gone, False).nonzero()[:, 0]
        w, inverse = _without(w, inverse, gone, stay)
        left = left[stay]
    return left


def _uncoupled(order: Tensor, inverse: Tensor, count: int) -> Tensor:
    """The first neurons of ``order``, ``count`` at most, ascending. One is left for a later step if its partial
    correlation with one that was taken before is high: of two equal neurons only one may go."""
    scale = inverse[order, order].rsqrt()
    coupled = (inverse[order][:, order] * scale * scale[:, None]).abs() > COUPLED
    blocked = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    taken: list[int] = []
    for place in range(len(order)):
        if len(taken) == count:
            break
        if not bool(blocked[place]):
            taken.append(place)
            blocked |= coupled[place]
    return order[taken].sort().values


def greedy_groups(weight: Tensor, gram: Tensor, kept: int, width: int) -> Tensor:
    """Removes one group of ``width`` columns ``J`` at a time, that with the lowest ``tr(W_J ((C⁻¹)_JJ)⁻¹ W_Jᵀ)``:
    ``[kept]`` int64, the groups that stay, ascending. Otherwise as :func:`greedy`."""
    w, inverse = weight.double(), _inverse(gram)
    left = torch.arange(len(inverse) // width, device=inverse.device)
    while len(left) > kept:
        own = torch.arange(len(left) * width, device=left.device).view(-1, width)
        blocks = torch.linalg.inv(inverse[own[:, :, None], own[:, None, :]])
        columns = w.T[own]  # [groups, width, d_out]
        losses = (blocks * (columns @ columns.mT)).sum((1, 2))
        worst = int(losses.argmin())
        gone = own[worst]
        stay = torch.cat([own[:worst], own[worst + 1 :]]).flatten()
        w, inverse = _without(w, inverse, gone, stay)
        left = torch.cat([left[:worst], left[worst + 1 :]])
    return left


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of the damped second moments, float64."""
    second = gram.to(torch.float64, copy=True)
    second.diagonal().add_(DAMPING * second.diagonal().mean().clamp_min(1e-30))
    return torch.cholesky_inverse(torch.linalg.cholesky(second))


def _without(w: Tensor, inverse: Tensor, gone: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares matrix on the columns that stay, and the inverse of their second moments."""
    block = torch.linalg.inv(inverse[gone][:, gone])
    across = inverse[gone][:, stay]
    return w[:, stay] - w[:, gone] @ block @ across, inverse[stay][:, stay] - across.T @ block @ across


def turning(h: Tensor, output: Tensor, weight: Tensor, width: int = 1) -> Tensor:
    """``[units]``: the sum over tokens of twice the cosine distance between the block's output ``o`` with and without
    each unit, ``‖(o - δ) / ‖o - δ‖ - o / ‖o‖‖²`` with ``δ = W_J h_J``.

    Of single columns it is taken to second order: ``Σ_t (‖δ‖² - (δᵀ o)² / ‖o‖²) / ‖o‖²``. This would give both of two
    groups of heads, which make all of an output, the same score.

    Args:
        h: the inputs of the matrix, ``[tokens, units * width]``.
        output: ``o``, to which the units' contributions are added, ``[tokens, d_out]``.
        weight: ``W [d_out, units * width]`` float32.
        width: columns of a unit.
    """
    h, output = h.float(), output.float()
    if width == 1:
        squares = output.square().sum(1, keepdim=True).clamp_min(1e-30)
        along = (output @ weight).square() / squares
        across: Tensor = (h.square() * (weight.square().sum(0) - along) / squares).sum(0)
        return across
    found, direction = [], functional.normalize(output, dim=1)
    for start in range(0, weight.shape[1], width):
        columns = slice(start, start + width)
        left = output - h[:, columns] @ weight[:, columns].T
        found.append((functional.normalize(left, dim=1) - direction).square().sum())
    return torch.stack(found)
