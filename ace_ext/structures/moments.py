"""Second moments of the neurons of one block, and the least squares that compensates for removed ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-6, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Regularisations that :func:`fitted` tries, relative to the mean diagonal of the kept neurons' second moments."""


class Moments:
    """Sums over tokens of the neurons ``h [tokens, neurons]`` and a target ``y [tokens, d_out]``, in float32.

    Args:
        neurons: how many there are.
        outputs: entries of the target.
        device: where the sums are.
    """

    def __init__(self, neurons: int, outputs: int, device: torch.device) -> None:
        self.tokens = 0
        self.gram = torch.zeros(neurons, neurons, device=device)
        """``Σ h hᵀ [neurons, neurons]``."""
        self.cross = torch.zeros(neurons, outputs, device=device)
        """``Σ h yᵀ [neurons, d_out]``."""
        self.total = torch.zeros(neurons, device=device)
        """``Σ h [neurons]``."""
        self.target = torch.zeros(outputs, device=device)
        """``Σ y [d_out]``."""
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        """``Σ ‖y‖² []``, float64."""

    def add_(self, h: Tensor, y: Tensor) -> None:
        """Adds tokens."""
        h, y = h.float(), y.float()
        self.gram.addmm_(h.T, h)
        self.cross.addmm_(h.T, y)
        self.total += h.sum(0)
        self.target += y.sum(0)
        self.squares += y.double().square().sum()
        self.tokens += len(h)

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens."""
        neurons, outputs = self.cross.shape
        both = Moments(neurons, outputs, self.cross.device)
        both.tokens = self.tokens + other.tokens
        for name in ("gram", "cross", "total", "target", "squares"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def error(self, kept: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        """The mean over tokens of ``‖W h_S + b - y‖²``.

        Args:
            kept: the neurons S, ``[k]``.
            weight: ``W [d_out, k]``.
            bias: ``b [d_out]``; None: zero.
        """
        w = weight.double()
        gram, cross = self.gram[kept][:, kept].double(), self.cross[kept].double()
        found = ((w @ gram) * w).sum() - 2 * (w * cross.T).sum() + self.squares
        if bias is not None:
            b = bias.double()
            found += 2 * b @ (w @ self.total[kept].double() - self.target.double()) + self.tokens * b.square().sum()
        return float(found) / max(1, self.tokens)


@dataclass(frozen=True)
class Fit:
    """A matrix on the kept neurons, ``[d_out, k]`` and ``[d_out]``, with its error on held-back tokens."""

    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    """None: the weights are those of the dense matrix."""
    error_before: float
    """Mean squared error on held-back tokens with the dense matrix's weights."""
    error: float


def fitted(train: Moments, held: Moments, kept: Tensor, weight: Tensor, bias: Tensor | None) -> Fit:
    """The matrix ``W'`` on the kept neurons with the least error on held-back tokens.

    ``W' = (E[y hᵀ] + λ W_S) (E[h hᵀ] + λ I)⁻¹`` with the kept neurons ``h`` and the dense columns ``W_S``, for each λ
    of :data:`RIDGES`. With a bias, moments are about the mean, and ``b' = E[y] - W' E[h]``. The chosen λ is then fitted
    on all tokens. If no λ lowers the error, the result is ``W_S``.

    Args:
        train: moments of the neurons and of what the matrix should give, without held-back tokens.
        held: the same of held-back tokens.
        kept: the neurons that stay, ``[k]``, ascending.
        weight: the dense matrix, ``[d_out, neurons]`` float32.
        bias: its bias, ``[d_out]`` float32, or None.
    """
    plain = weight[:, kept]
    before = held.error(kept, plain, bias)
    best, lowest = None, before
    for ridge in RIDGES if train.tokens and held.tokens else ():
        error = held.error(kept, *_solution(train, kept, plain, bias, ridge))
        if error < lowest:
            best, lowest = ridge, error
    if best is None:
        return Fit(plain, bias, None, before, before)
    return Fit(*_solution(train.plus(held), kept, plain, bias, best), best, before, lowest)


def _solution(
    moments: Moments, kept: Tensor, plain: Tensor, bias: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """The least-squares matrix and its bias."""
    count = moments.tokens
    gram, cross = moments.gram[kept][:, kept].double() / count, moments.cross[kept].double() / count
    mean, target = moments.total[kept].double() / count, moments.target.double() / count
    if bias is not None:
        gram, cross = gram - mean.outer(mean), cross - mean.outer(target)
    damping = ridge * gram.diagonal().mean().clamp_min(1e-30)
    gram.diagonal().add_(damping)
    factor = torch.linalg.cholesky(gram)
    found = torch.cholesky_solve(cross + damping * plain.T.double(), factor).T
    return found.float(), None if bias is None else (target - found @ mean).float()
