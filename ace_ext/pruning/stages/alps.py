"""ALPS (arXiv 2406.07831): ADMM with a rising penalty chooses the mask, then conjugate gradients fit the kept weights.

The Gram matrix ``G [cols, cols]`` of the inputs measures errors (:mod:`ace_ext.pruning.gram`): the change ``e`` of a
row costs ``e G eᵀ``. Everything is computed in float32, on columns normalised by the root of the damped diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.gram import DEAD, masked, restore_dead_
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import (
    AUTO,
    COSINE,
    PLAIN,
    SHARED,
    Problem,
    Solve,
    Solved,
    damping_option,
    gram_option,
)
from ace_ext.pruning.symmetric import inverse

PENALTY = 0.1
"""ρ of the first iterations; the diagonal of the normalised Gram matrix is 1."""
PERIOD = 3
"""Iterations between two changes of ρ."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""What ρ is multiplied with if more than a share of the kept weights changed in the last period; the first that
applies."""
SETTLED, SETTLED_AFTER = 3e-4, 30
"""The mask is final once at most this share of it changes in a period, after so many iterations, as in the authors'
code (github.com/mazumder-lab/ALPS); before, only once nothing changes, as in the paper."""


@dataclass(frozen=True)
class Alps(Solve):
    """ADMM with a rising penalty, then conjugate gradients."""

    name = "alps"
    summary = "mask by ADMM with a rising penalty, then weights by conjugate gradients (arXiv 2406.07831)"
    groups = ("matrix", "row")
    mask_options = ("iterations",)
    shares_rows = False

    damping: float = damping_option(0.01)
    iterations: int = option(
        300, "iterations of ADMM at most; it ends when the mask hardly changes", Limits(at_least=1)
    )
    steps: int = option(10, "steps of conjugate gradients with the mask fixed", Limits(at_least=0, words="0 or more"))
    gram: str = gram_option(AUTO, PLAIN, SHARED, COSINE)

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight. With a mask only conjugate gradients run, from the weights that it keeps."""
        hessian, norm, dead = _normalised(problem.whole_gram.matrix, self.damping)
        dense = problem.dense * norm
        if problem.mask is None:
            weight, mask = _admm(dense, hessian, problem, self.iterations)
        else:
            weight, mask = masked(dense, problem.mask, out=torch.empty_like(dense)), problem.mask
        _fit_(weight, dense, mask, hessian, self.steps)
        weight.add_(0.0).div_(norm)  # -0.0 + 0.0 is +0.0
        restore_dead_(weight, problem.dense, mask, dead)
        return Solved(weight, self.damping, 1)

    def working_bytes(self, rows: int, cols: int) -> int:
        """The larger of two phases. ADMM: the normalised Gram matrix, two matrices while the next inverse is computed,
        four buffers of the weight's size and masks. Conjugate gradients: the Gram matrix and six buffers."""
        return max(12 * cols * cols + 18 * rows * cols, 4 * cols * cols + 25 * rows * cols)


def _normalised(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """``H [cols, cols]`` with a diagonal of ones, the norms ``[cols]`` of its columns, and which are dead: ``[cols]``
    bool."""
    dead = gram.diagonal() == 0
    added = damping * gram.diagonal().mean()
    norm = (gram.diagonal() + added).sqrt().masked_fill_(dead, DEAD)
    if not bool(torch.isfinite(norm.sum())):
        raise torch.linalg.LinAlgError("its diagonal is not finite")  # type: ignore[attr-defined]
    hessian = gram / norm
    hessian /= norm[:, None]
    hessian.diagonal().fill_(1.0)
    return hessian, norm, dead


def _admm(dense: Tensor, hessian: Tensor, problem: Problem, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper on normalised columns. Returns the masked weight ``Z [rows, cols]`` and its mask.

    ``W ← (H + ρ)⁻¹ (H W₀ + ρ Z - V)``, computed as ``W₀ + (ρ (Z - W₀) - V) (H + ρ)⁻¹``; ``Z`` are the largest entries
    of ``W + V / ρ``; ``V ← V + ρ (W - Z)``. Each :data:`PERIOD` iterations the penalty ρ rises by :data:`GROWTH`.
    """
    rho = PENALTY
    step: Tensor | None = None  # (H + ρ)⁻¹
    mask = before = _largest(dense, problem)
    kept, dual = masked(dense, mask, out=torch.empty_like(dense)), torch.zeros_like(dense)
    total, budget = torch.empty_like(dense), int(mask.count_nonzero())
    for number in range(1, iterations + 1):
        step = _inverse(hessian, rho) if step is None else step
        torch.addmm(dense, kept.sub_(dense).mul_(rho).sub_(dual), step, out=total).add_(dual, alpha=1 / rho)
        mask = _largest(total, problem)
        masked(total, mask, out=kept)
        torch.sub(total, kept, out=dual).mul_(rho)
        if number % PERIOD:
            continue
        changed = int((mask ^ before).count_nonzero()) / max(1, budget)
        if changed <= (SETTLED if number > SETTLED_AFTER else 0.0):
            break
        before, step = mask, None  # freed before the next one is made
        rho *= next(factor for share, factor in GROWTH if changed > share)
    return kept, mask


def _inverse(hessian: Tensor, rho: float) -> Tensor:
    """``(H + ρ)⁻¹``."""
    damped = hessian.clone()
    damped.diagonal().add_(rho)
    found = inverse(damped)
    if found is None:
        raise torch.linalg.LinAlgError("not positive definite")  # type: ignore[attr-defined]
    return found


def _largest(weight: Tensor, problem: Problem) -> Tensor:
    """The mask of the largest entries: ``[rows, cols]`` bool, True for exactly ``problem.keep`` of each group."""
    if problem.pattern is not None:
        return ops.nm_mask(weight, "magnitude", problem.pattern.keep_n, problem.pattern.group_m)
    return ops.topk_mask(weight, "magnitude", problem.keep, group=problem.group.name)


def _fit_(weight: Tensor, dense: Tensor, mask: Tensor, hessian: Tensor, steps: int) -> None:
    """Conjugate gradients for ``min (w - w₀) H (w - w₀)ᵀ`` of each row over its kept entries, in place from
    ``weight [rows, cols]`` (algorithm 2 of the paper). The diagonal of H, which the paper divides by, is 1. No step
    raises the error."""
    direction = (dense - weight) @ hessian
    residual = masked(direction, mask, out=direction).clone()
    square, product = residual.square().sum(1, keepdim=True), torch.empty_like(residual)
    for _ in range(steps):
        masked(torch.mm(direction, hessian, out=product), mask, out=product)
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, square / curvature, 0.0)
        weight.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        last, square = square, residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(last > 0, square / last, 0.0)).add_(residual)


STAGE = Alps
