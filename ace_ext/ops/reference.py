"""The float64 reference of every op and metric: slow and obvious. Imports nothing of the fast path.

One function for each op or metric, written from its definition and not from the kernels: two passes where they stream,
a full stable sort where they select by radix. Shapes as in ``csrc/ops.h``: ``weight [rows, cols]``, ``x [T, d_in]``
inputs of the layer, one token a row, ``a [T, d_out]`` its outputs without bias. Higher score = keep; masks are True
where kept. Inputs may be of any floating dtype and are widened first; results are new CPU tensors; no argument is
written to.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Moments(NamedTuple):
    """A weighted Welford state, float64."""

    weight_sum: Tensor  # []
    mean: Tensor  # [d]
    m2: Tensor  # [d], weighted sum of squared deviations from the mean


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().to(torch.float64)


def _given(t: Tensor | None) -> Tensor:
    if t is None:
        raise ValueError("this needs an argument that was not given")
    return t


# Statistics


def moments(x: Tensor, token_weight: Tensor | None = None) -> Moments:
    """State of tokens ``x [T, d]``, ``token_weight [T]`` (None: 1 each), in two passes; zeros if all weights are 0.

    ``w = sum_t w_t``, ``mean = sum_t w_t x_t / w``, ``m2 = sum_t w_t (x_t - mean)^2``.
    """
    x = _wide(x)
    share = torch.ones(len(x), dtype=torch.float64) if token_weight is None else _wide(token_weight)
    total = share.sum()
    if total == 0:
        return Moments(total, torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1]).double())
    mean = (share[:, None] * x).sum(0) / total
    return Moments(total, mean, (share[:, None] * (x - mean) ** 2).sum(0))


def merge(state_a: Sequence[Tensor], state_b: Sequence[Tensor]) -> Moments:
    """State of the tokens of both states: Chan, Golub and LeVeque (1983). A side of weight 0 changes nothing.

    ``w = w_a + w_b``; ``d = m_b - m_a``; ``m = m_a + d w_b / w``; ``M2 = M2_a + M2_b + d^2 w_a w_b / w``.
    """
    (weight_a, mean_a, m2_a), (weight_b, mean_b, m2_b) = ([_wide(t) for t in state] for state in (state_a, state_b))
    if weight_b == 0:
        return Moments(weight_a, mean_a, m2_a)
    if weight_a == 0:
        return Moments(weight_b, mean_b, m2_b)
    weight, delta = weight_a + weight_b, mean_b - mean_a
    return Moments(weight, mean_a + delta * weight_b / weight, m2_a + m2_b + delta**2 * weight_a * weight_b / weight)


def inverse_square_norm(a: Tensor) -> Tensor:
    """``r [T]`` float64, ``r_t = 1 / ||a_t||^2`` for ``a [T, d]``; 0 for a row of zeros."""
    squares = (_wide(a) ** 2).sum(1)
    return torch.where(squares == 0, 0.0, 1.0 / squares)


def cosine_moment(x: Tensor, a: Tensor) -> Tensor:
    """``[d_out, d_in]`` float64, ``q_ij = sum_t r_t^2 a_ti^2 x_tj^2``: the second sum of the cosine loss."""
    r = inverse_square_norm(a)
    return ((r[:, None] * _wide(a)) ** 2).T @ _wide(x) ** 2


def gram(x: Tensor) -> Tensor:
    """``[d, d]`` float64, ``Σ_t x_t x_tᵀ``."""
    return _wide(x).T @ _wide(x)


def exact_cosine_loss(weight: Tensor, x: Tensor) -> Tensor:
    """``[rows, cols]`` float64, ``sum_t 1 - cos(A_t, A_t with W_ij removed)``: one weight at a time, no approximation.

    Uses ``1 - cos(u, v) = ||u/|u| - v/|v| ||^2 / 2``, which does not cancel if the angle is small. A token whose dense
    output is zero has no direction and counts 0 (as ``r_t = 0`` does); one whose output becomes zero counts 1.
    """
    weight, x = _wide(weight), _wide(x)
    dense = x @ weight.T
    loss = torch.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            pruned = dense.clone()
            pruned[:, i] -= weight[i, j] * x[:, j]
            for before, after in zip(dense, pruned, strict=True):
                if before.norm() == 0:
                    continue
                if after.norm() == 0:
                    loss[i, j] += 1.0
                else:
                    loss[i, j] += (before / before.norm() - after / after.norm()).square().sum() / 2
    return loss


# Scores


def column_factor(metric: str, x: Tensor, a: Tensor | None = None, exponent: float = 0.5) -> Tensor | None:
    """The metric's factor of each input column, ``[d_in]`` float64, from raw activations; None for magnitude.

    ``a`` is read by cosvar, ace and cosp-exact (whose factor is ``sum_t r_t x_tj^2``), ``exponent`` by ria.
    """
    if metric == "magnitude":
        return None
    x = _wide(x)
    norm, deviation = (x**2).sum(0).sqrt(), (moments(x).m2 / len(x)).sqrt()

    def weighted_deviation() -> Tensor:
        return moments(x, inverse_square_norm(_given(a))).m2.sqrt()

    factors: dict[str, Callable[[], Tensor]] = {
        "wanda": lambda: norm,
        "ria": lambda: norm**exponent,
        "stade": lambda: deviation,
        "varp": lambda: deviation,
        "cosp": lambda: norm,
        "ace": lambda: norm * deviation,
        "cosp-exact": lambda: (inverse_square_norm(_given(a))[:, None] * x**2).sum(0),
        "cosvar": weighted_deviation,
        "norm-cosvar": lambda: (norm * weighted_deviation()).sqrt(),
    }
    return factors[metric]()


def _sqrt(t: Tensor) -> Tensor:
    """Correctly rounded, as in IEEE 754 and the kernels: torch's float32 sqrt may be one unit off on a CPU."""
    return torch.from_numpy(np.sqrt(t.numpy()))


def score(
    weight: Tensor,
    formula: str,
    column: Tensor | None = None,
    moment: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``[rows, cols]`` scores: float64, or float32 with the products in the order of ``csrc/core/score.h``.

    ``column [cols]``, ``moment [rows, cols]``; formulas as in :mod:`ace_ext.ops`. In float32 the result has
    the bits of the op's: each operation rounds once, and the sums of ria are accumulated in float64.
    """
    size = weight.detach().cpu().to(dtype).abs()

    def given(t: Tensor | None) -> Tensor:
        return _given(t).detach().cpu().to(dtype)

    if formula == "magnitude":
        return size
    if formula == "scaled":
        return size * given(column)
    if formula == "ria":
        column_sum = size.to(torch.float64).sum(0, keepdim=True).to(dtype)
        row_sum = size.to(torch.float64).sum(1, keepdim=True).to(dtype)
        c = given(column)
        return torch.where(size == 0, 0.0 * c, (size / column_sum + size / row_sum) * c)
    if formula == "cosp":
        return (size * given(column)) * (size * _sqrt(given(moment)))
    if formula == "cosp_exact":  # c_j >= q_ij except for rounding, because a_ti^2 r_t <= 1
        return size * _sqrt(0.5 * (given(column) - given(moment)).clamp(min=0))
    if formula == "score":
        return given(moment).clone()
    raise ValueError(f"unknown formula {formula!r}")


# Masks


def _finite(score: Tensor) -> np.ndarray:
    values = _wide(score).numpy()
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    return values


def _best(scores: np.ndarray, keep_k: int) -> np.ndarray:
    """True at the ``keep_k`` best of ``scores [n]``: score descending, lower index first (-0.0 equals +0.0)."""
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:keep_k]] = True
    return mask


def keep_mask(score: Tensor, keep_k: int, group: str = "row") -> Tensor:
    """``[rows, cols]`` bool: the best ``keep_k`` of each row, or of the ``"matrix"`` in row-major order."""
    values = _finite(score)
    if group == "matrix":
        return torch.from_numpy(_best(values.reshape(-1), keep_k).reshape(values.shape))
    return torch.from_numpy(np.array([_best(row, keep_k) for row in values], dtype=bool).reshape(values.shape))


def keep_mask_nm(score: Tensor, keep_n: int, group_m: int) -> Tensor:
    """``[rows, cols]`` bool: the best ``keep_n`` of each ``group_m`` consecutive columns."""
    return keep_mask(score.reshape(-1, group_m), keep_n).reshape(score.shape)


def keep_mask_model(scores: Sequence[Tensor], keep_k: int) -> list[Tensor]:
    """One mask for each matrix: the best ``keep_k`` of all together; ties go to the earlier matrix, then row-major."""
    flat = np.concatenate([_finite(score).reshape(-1) for score in scores])
    parts = np.split(_best(flat, keep_k), np.cumsum([score.numel() for score in scores])[:-1])
    return [torch.from_numpy(part.reshape(score.shape)) for part, score in zip(parts, scores, strict=True)]


def threshold(score: Tensor, keep_k: int, group: str = "row") -> Tensor:
    """Smallest kept score of each group, ``[rows]`` or ``[1]`` float64: +0.0 for both zeros, +inf for nothing kept."""
    mask = keep_mask(score, keep_k, group)
    kept = torch.where(mask, _wide(score), math.inf).reshape(1 if group == "matrix" else len(score), -1)
    padded = torch.nn.functional.pad(kept, (0, 1), value=math.inf)  # a group of no entries has no minimum
    return padded.amin(1) + 0.0


def prune(weight: Tensor, mask: Tensor) -> Tensor:
    """A copy of ``weight`` with +0.0 where ``mask`` is False; kept entries keep their bits."""
    return torch.where(mask, weight.detach().cpu(), torch.zeros((), dtype=weight.dtype))


# Solvers


def swap_loss(mask: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """``[rows]`` float64, ``e^T G e`` with ``e`` the removed weights of a row: the squared error of its output."""
    removed = torch.where(mask.cpu(), 0.0, _wide(weight))
    return ((removed @ _wide(gram)) * removed).sum(1)


def refine_swaps(
    mask: Tensor, weight: Tensor, gram: Tensor, keep_n: int = 0, group_m: int = 0, max_swaps: int = 100
) -> tuple[Tensor, Tensor]:
    """The refined mask ``[rows, cols]`` and the swaps ``[rows]``; every loss is computed from its definition.

    Without a pattern, restores the removed weight that leaves the least loss, then removes the kept weight that does;
    with one, swaps the best pair of any group. Lower columns first among equals.
    """
    mask, weight, gram = mask.cpu().clone(), _wide(weight), _wide(gram)
    swaps = torch.zeros(len(mask), dtype=torch.int64)
    norms = (weight.abs() * gram.diagonal().abs().sqrt()).sum(1)
    for i, row in enumerate(mask):
        loss = swap_loss(row[None], weight[i : i + 1], gram)
        while swaps[i] < max_swaps:
            best = _best_swap(row, weight[i], gram, group_m)
            if best is None or not best[2] < loss - 2.0**-40 * norms[i] ** 2:  # less could be rounding
                break
            restored, removed, after = best
            row[restored], row[removed] = True, False
            loss = after
            swaps[i] += 1
    return mask, swaps


def _best_swap(row: Tensor, weight: Tensor, gram: Tensor, group_m: int) -> tuple[int, int, Tensor] | None:
    """The columns to restore and to remove, and the loss ``[1]`` after that."""
    removed, kept = (~row).nonzero().flatten().tolist(), row.nonzero().flatten().tolist()

    def loss(restore: int, remove: int | None = None) -> Tensor:
        changed = row.clone()
        changed[restore] = True
        if remove is not None:
            changed[remove] = False
        return swap_loss(changed[None], weight[None], gram)

    if group_m == 0 and removed:
        removed = [min(removed, key=lambda j: float(loss(j)))]  # the first of equals
    pairs = [(j, i) for j in removed for i in kept if group_m == 0 or i // group_m == j // group_m]
    if not pairs:
        return None
    best = min(pairs, key=lambda pair: float(loss(*pair)))
    return *best, loss(*best)


def obs_block(
    weight: Tensor,
    mask: Tensor,
    factor: Tensor,
    keep_n: int = 0,
    group_m: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """SparseGPT's recursion (arXiv 2301.00774) over the columns of a block: new weight, error and mask.

    In float32 the products are rounded in the order of ``csrc/core/obs_block.h``: the results have the op's bits.
    """
    weight, factor = (t.detach().cpu().to(dtype).clone() for t in (weight, factor))
    mask, error = mask.cpu().clone(), torch.zeros_like(weight)
    for c in range(weight.shape[1]):
        if group_m > 0 and c % group_m == 0:
            size = weight[:, c : c + group_m].abs() / factor.diagonal()[c : c + group_m]
            mask[:, c : c + group_m] = keep_mask(size, keep_n)
        removed = ~mask[:, c]
        error[removed, c] = weight[removed, c] / factor[c, c]
        changed = error[:, c] != 0
        weight[changed, c + 1 :] -= error[changed, c, None] * factor[c, c + 1 :]
        weight[removed, c] = 0.0
    return weight, error, mask


def quantize_block(
    weight: Tensor,
    mask: Tensor,
    scale: Tensor,
    factor: Tensor,
    bits: int,
    current: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """GPTQ's recursion (arXiv 2210.17323) over the columns of a block with a fixed mask: new weight and error.

    In float32 the products are rounded in the order of ``csrc/core/quantize_block.h``: the results have the op's bits.
    """
    weight, factor = (t.detach().cpu().to(dtype).clone() for t in (weight, factor))
    error, wide = torch.zeros_like(weight), scale.cpu().to(dtype)
    for c in range(weight.shape[1]):
        code = (weight[:, c] / wide).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round()
        code = torch.where(mask.cpu()[:, c] & (wide != 0), code, 0.0)
        value = (code.float() * scale.cpu().float()).to(scale.dtype).to(dtype)
        change = weight[:, c] - value if current is None else value - current.cpu().to(dtype)[:, c]
        error[:, c] = change / factor[c, c]
        weight[:, c + 1 :] -= error[:, c, None] * factor[c, c + 1 :]
        weight[:, c] = value
    return weight, error
