"""Second moments of the inputs of a matrix, and the least squares that compensates for removed ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-6)
"""Regularisations that :func:`fitted` tries in this order, relative to the mean diagonal of the kept inputs' second
moments."""
SINGLE = 0.001
"""From this regularisation on float32 is exact enough to solve for the fit."""


class Moments:
    """Weighted sums over tokens of the inputs ``h [tokens, columns]`` of a matrix, in float32.

    Args:
        columns: how many inputs there are.
        device: where the sums are.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.weight = 0.0
        """``Σ r²``."""
        self.gram = torch.zeros(columns, columns, device=device)
        """``Σ r² h hᵀ [columns, columns]``."""
        self.total = torch.zeros(columns, device=device)
        """``Σ r² h [columns]``."""

    def add_(self, h: Tensor, scale: Tensor) -> None:
        """Adds tokens. ``scale [tokens]``: r, the root of each token's weight."""
        scaled = h.float() * scale[:, None]
        self.gram.addmm_(scaled.T, scaled)
        self.total.addmv_(scaled.T, scale)
        self.weight += float(scale.double().square().sum())

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens."""
        both = Moments(len(self.total), self.total.device)
        both.weight = self.weight + other.weight
        both.gram, both.total = self.gram + other.gram, self.total + other.total
        return both

    def error(self, change: Tensor, offset: Tensor | None = None) -> float:
        """The weighted mean over tokens of ``‖E h + e‖²``.

        Args:
            change: ``E [d_out, columns]``.
            offset: ``e [d_out]``; None: zero.
        """
        found = ((change @ self.gram) * change).sum(dtype=torch.float64)
        if offset is not None:
            found += 2 * (offset @ (change @ self.total)).double() + self.weight * offset.double().square().sum()
        return max(0.0, float(found)) / max(self.weight, 1e-30)


@dataclass(frozen=True)
class Fit:
    """A matrix on the kept inputs, ``[d_out, k]`` and ``[d_out]``, with its error on held-out tokens."""

    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    """None: the weights are those of the dense matrix."""
    error_before: float
    """Mean squared error on held-out tokens with the dense matrix's weights."""
    error: float


def fitted(train: Moments, held: Moments, kept: Tensor, weight: Tensor, bias: Tensor | None) -> Fit:
    """The matrix ``W'`` on the kept inputs ``h_S`` that best gives what the dense matrix gives with all of them.

    ``W' = W_S + W_R C_RS (C_SS + λ)⁻¹`` with the removed columns ``W_R`` and the inputs' second moments ``C``, for the
    λ of :data:`RIDGES` with the least error on held-out tokens; smaller ones are tried as long as the error falls.
    With a bias, moments are about the mean, and ``b' = b + W E[h] - W' E[h_S]``. The chosen λ is then used with all
    tokens. If none lowers the error, the result is ``W_S``.

    Args:
        train: moments of the inputs without held-out tokens.
        held: the same of held-out tokens.
        kept: the inputs that stay, ``[k]``, ascending.
        weight: the dense matrix, ``[d_out, columns]`` float32.
        bias: its bias, ``[d_out]`` float32, or None.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, kept, False)
    removed = gone.nonzero()[:, 0]
    change = torch.where(gone, -weight, 0.0)
    lowest = before = held.error(change)
    best = None
    for ridge in RIDGES if train.weight and held.weight else ():
        added = _solution(train, kept, removed, weight, bias is not None, ridge)
        if added is None:
            break
        change[:, kept] = added
        error = held.error(change, None if bias is None else -(change @ train.total) / train.weight)
        if not error < lowest:
            break
        best, lowest = ridge, error
    both = train.plus(held)
    added = None if best is None else _solution(both, kept, removed, weight, bias is not None, best)
    if added is None:
        return Fit(weight[:, kept], bias, None, before, before)
    change[:, kept] = added
    shifted = None if bias is None else bias - (change @ both.total) / both.weight
    return Fit(weight[:, kept] + added, shifted, best, before, lowest)


def updated(moments: Moments, kept: Tensor, weight: Tensor, bias: Tensor | None, kind: str, ridge: float) -> Fit:
    """The matrix on the kept inputs without held-out tokens; errors are those on the same tokens.

    Args:
        moments: of the inputs.
        kept: the inputs that stay, ``[k]``, ascending.
        weight: the dense matrix, ``[d_out, columns]`` float32.
        bias: its bias, ``[d_out]`` float32, or None.
        kind: ``none``: ``W_S``; ``bias``: with ``b + W_R E[h_R]``, where ``R`` are the removed inputs, if there is a
            bias; ``matrix``: ``W_S + W_R C_RS (C_SS + λ)⁻¹``.
        ridge: λ of ``matrix``, relative to the mean diagonal of ``C_SS``.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, kept, False)
    removed = gone.nonzero()[:, 0]
    change = torch.where(gone, -weight, 0.0)
    before = moments.error(change)
    if kind == "bias" and bias is not None:
        offset = weight[:, removed] @ moments.total[removed] / moments.weight
        return Fit(weight[:, kept], bias + offset, None, before, moments.error(change, offset))
    added = _solution(moments, kept, removed, weight, False, ridge) if kind == "matrix" else None
    if added is None:
        return Fit(weight[:, kept], bias, None, before, before)
    change[:, kept] = added
    return Fit(weight[:, kept] + added, bias, ridge, before, moments.error(change))


def _solution(
    moments: Moments, kept: Tensor, removed: Tensor, weight: Tensor, centred: bool, ridge: float
) -> Tensor | None:
    """``W_R C_RS (C_SS + λ)⁻¹ [d_out, k]``; None if the inputs are too much alike for it."""
    dtype = torch.float32 if ridge >= SINGLE else torch.float64
    gram, cross = (moments.gram[kept][:, own].to(dtype) / moments.weight for own in (kept, removed))
    if centred:
        mean = moments.total.to(dtype) / moments.weight
        gram, cross = gram - mean[kept].outer(mean[kept]), cross - mean[kept].outer(mean[removed])
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-30))
    factor, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return None
    found: Tensor = torch.cholesky_solve(cross @ weight[:, removed].to(dtype).T, factor).T
    return found.float()
