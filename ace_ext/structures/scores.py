"""Which neurons stay, by the scores of :data:`ace_ext.pruning.removal.SCORES`."""

import torch
from torch import Tensor

from ace_ext.structures.moments import Moments

DAMPING = 0.01
"""Added to the diagonal of the second moments, relative to its mean."""
ROUNDS = 48
"""About the number of steps in which ``obs`` removes neurons."""
COUPLED = 0.5
"""Neurons with a higher partial correlation are not removed in the same step."""


def kept_neurons(score: str, kept: int, weight: Tensor, moments: Moments, turned: Tensor | None) -> Tensor:
    """The neurons that stay: ``[kept]`` int64, ascending.

    Args:
        score: a name of :data:`ace_ext.pruning.removal.SCORES`.
        kept: how many stay.
        weight: the matrix that reads the neurons, ``[d_out, neurons]`` float32.
        moments: of the neurons over all calibration tokens.
        turned: ``[neurons]``, the sums of :func:`turning`, which only ``cosine`` reads.
    """
    if score == "obs":
        return greedy(weight, moments.gram / moments.tokens, kept)
    if score == "cosine":
        assert turned is not None  # collected for this score
        scores = turned
    else:
        mean = moments.total / moments.tokens
        variance = moments.gram.diagonal() / moments.tokens - mean.square()
        scores = variance * weight.square().sum(0)
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
    second = gram.to(torch.float64, copy=True)
    second.diagonal().add_(DAMPING * second.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    del second
    w, left = weight.double(), torch.arange(len(inverse), device=inverse.device)
    step = max(1, -(-(len(left) - kept) // rounds))
    while len(left) > kept:
        count = min(step, len(left) - kept)
        scores = w.square().sum(0) / inverse.diagonal()
        gone = _uncoupled(scores.sort(stable=True).indices[: 2 * count], inverse, count)
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill_(0, gone, False).nonzero()[:, 0]
        block = torch.linalg.inv(inverse[gone][:, gone])
        across = inverse[gone][:, stay]
        w = w[:, stay] - w[:, gone] @ block @ across
        inverse = inverse[stay][:, stay] - across.T @ block @ across
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


def turning(h: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """``[neurons]``: the sum over tokens of twice the cosine distance between the block's output with and without each
    neuron, to second order: ``Σ_t h_j² (‖W_j‖² - (W_jᵀ o)² / ‖o‖²) / ‖o‖²``.

    Args:
        h: the neurons, ``[tokens, neurons]``.
        output: ``o``, to which the neurons' contributions are added, ``[tokens, d_out]``.
        weight: ``W [d_out, neurons]`` float32.
    """
    h, output = h.float(), output.float()
    squares = output.square().sum(1, keepdim=True).clamp_min(1e-30)
    along = (output @ weight).square() / squares
    across: Tensor = (h.square() * (weight.square().sum(0) - along) / squares).sum(0)
    return across
