"""The ops, one function each. ``csrc/ops.h`` and ``csrc/ops/`` have the full contracts.

Weights are ``[rows, cols]`` float32, float16 or bfloat16, contiguous columns; rows are output channels. Higher score =
keep; among equal scores the lower column is kept first. Functions that end in ``_`` write into their first arguments;
pruned entries become +0.0. All raise ``ValueError`` for bad input before anything is written, also if a weight, factor
or score is NaN or infinite (on CUDA that check is deferred: :func:`take_not_finite`).

``formula`` names the score of a weight; ``c`` is ``column [cols]`` and ``q`` is ``moment [rows, cols]``, both float32::

    name        score of W_ij                          column and moment
    magnitude   |W|                                    neither
    scaled      |W| c                                  column: any metric that is a factor of each column
    ria         (|W| / Σ_i |W| + |W| / Σ_j |W|) c      column: ‖X_j‖^a
    cosp        |W| c · |W| sqrt(q)                    column: ‖X_j‖, or that times σ_j; moment
    cosp_exact  |W| sqrt((c - q) / 2)                  column: Σ_t r_t X_tj²; moment
    score       q                                      moment: the caller's own score; the weight is not scored

Importing this package registers the ops with torch, as ``torch.ops.ace_ext``. If the compiled module cannot be loaded,
the first call of an op says why. The package imports nothing of ace_ext outside this folder.
"""

import contextlib

import torch
from torch import Tensor

from ace_ext.ops._across import ScoredWeight, prune_topk_across_
from ace_ext.ops._extension import compiled, registered
from ace_ext.ops._packed import packed_linear, quantized_linear, register_packed, unpack_bitmap, unpack_quantized

__all__ = [
    "FORMULAS",
    "ScoredWeight",
    "admm_change_",
    "admm_update_",
    "balance_mean_",
    "inverse_square_norm",
    "nm_mask",
    "obs_block_",
    "packed_linear",
    "prune_nm_",
    "prune_topk_",
    "prune_topk_across_",
    "quantize_block_",
    "quantized_linear",
    "refine_swaps_",
    "restore_mean_",
    "score",
    "take_not_finite",
    "topk_mask",
    "unpack_bitmap",
    "unpack_quantized",
    "update_cosine_moment_",
    "update_gram_",
    "update_moments_",
]

FORMULAS = ("magnitude", "scaled", "ria", "cosp", "cosp_exact", "score")
"""Names of the formulas: ``kFormulas`` in ``csrc/core/score.h``."""

with contextlib.suppress(ImportError):  # which the first call of an op raises
    register_packed()

# Statistics of activations


@torch.no_grad()
def update_moments_(
    weight_sum: Tensor, mean: Tensor, m2: Tensor, x: Tensor, token_weight: Tensor | None = None
) -> None:
    """Merges tokens ``x [T, d]`` into a weighted Welford state: ``weight_sum []``, ``mean [d]``, ``m2 [d]``.

    The state is float32 or float64; ``token_weight [T]`` float32, finite and not negative, or None for 1 each. ``m2``
    is the weighted sum of squared deviations from the weighted mean, merged by Chan, Golub and LeVeque's rule (1983).
    """
    registered().update_moments_(weight_sum, mean, m2, x, token_weight)


@torch.no_grad()
def inverse_square_norm(a: Tensor) -> Tensor:
    """``r [T]`` float32 with ``r_t = 1 / ||a_t||^2`` for ``a [T, d]``; a row of zeros gives 0."""
    r: Tensor = registered().inverse_square_norm(a)
    return r


@torch.no_grad()
def update_cosine_moment_(moment: Tensor, x: Tensor, a: Tensor) -> None:
    """``moment [d_out, d_in] += sum_t r_t^2 a_ti^2 x_tj^2`` for ``x [T, d_in]`` and ``a [T, d_out]``; float32."""
    registered().update_cosine_moment_(moment, x, a)


@torch.no_grad()
def update_gram_(gram: Tensor, x: Tensor, mirror: bool = True) -> None:
    """``gram [d, d] += xᵀ x`` for ``x [T, d]``, on the CPU; ``gram`` is float32, contiguous and symmetric.

    Products of bfloat16 are exact and summed in float32. Half of the products are computed.

    Args:
        gram: the matrix.
        x: the tokens.
        mirror: False: the upper half of ``gram`` is undefined until a call with True, for which ``x`` may be empty.
    """
    registered().update_gram_(gram, x, mirror)


# Scores, masks and pruning


@torch.no_grad()
def score(weight: Tensor, formula: str, column: Tensor | None = None, moment: Tensor | None = None) -> Tensor:
    """The scores ``[rows, cols]`` float32. The other ops recompute scores where they need them."""
    scores: Tensor = registered().score(weight, formula, column, moment)
    return scores


@torch.no_grad()
def prune_topk_(
    weight: Tensor,
    formula: str,
    keep_k: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
    group: str = "row",
) -> Tensor:
    """Keeps the best ``keep_k`` of each row, or of the ``"matrix"``; returns each group's smallest kept score.

    The threshold is ``[rows]`` or ``[1]`` float32, +inf where nothing is kept.
    """
    threshold: Tensor = registered().prune_topk_(weight, formula, keep_k, column, moment, group)
    return threshold


@torch.no_grad()
def prune_nm_(
    weight: Tensor,
    formula: str,
    keep_n: int,
    group_m: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
) -> None:
    """Keeps the best ``keep_n`` of each ``group_m`` (at most 32) consecutive columns of every row."""
    registered().prune_nm_(weight, formula, keep_n, group_m, column, moment)


@torch.no_grad()
def topk_mask(
    weight: Tensor,
    formula: str,
    keep_k: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
    group: str = "row",
) -> Tensor:
    """``[rows, cols]`` bool, True where :func:`prune_topk_` would keep the weight, which is not changed."""
    mask: Tensor = registered().topk_mask(weight, formula, keep_k, column, moment, group)
    return mask


@torch.no_grad()
def nm_mask(
    weight: Tensor,
    formula: str,
    keep_n: int,
    group_m: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
) -> Tensor:
    """``[rows, cols]`` bool, True where :func:`prune_nm_` would keep the weight, which is not changed."""
    mask: Tensor = registered().nm_mask(weight, formula, keep_n, group_m, column, moment)
    return mask


# Solvers


@torch.no_grad()
def refine_swaps_(
    mask: Tensor, weight: Tensor, gram: Tensor, keep_n: int = 0, group_m: int = 0, max_swaps: int = 100
) -> Tensor:
    """Exchanges kept and removed weights, row by row, while that lowers the row's loss ``e^T G e``; ``[rows]`` int64.

    ``e`` holds the row's removed weights; ``gram`` ``G [cols, cols]`` float32 is symmetric, positive semidefinite and
    contiguous. Each swap restores the removed weight whose restoration lowers the loss most, and removes the kept
    weight that then costs least; each lowers the loss computed in float64. With ``keep_n`` of ``group_m`` the best pair
    of any group is swapped, which preserves the pattern; both 0 for rows without one. ``mask [rows, cols]`` bool, True
    where kept, is written; ``weight`` is not. Returns the swaps made in each row, at most ``max_swaps``.
    """
    swaps: Tensor = registered().refine_swaps_(mask, weight, gram, keep_n, group_m, max_swaps)
    return swaps


@torch.no_grad()
def balance_mean_(
    mask: Tensor, weight: Tensor, variance: Tensor, mean: Tensor, group_m: int = 0, rounds: int = 1
) -> Tensor:
    """Exchanges kept and removed weights, row by row, so that the removed ones shift the output's mean less.

    With ``variance [cols]`` and ``mean [cols]`` float32 of the inputs, a row's removed weights cost
    ``Σ w_j² variance_j + (Σ w_j mean_j)²``; each swap lowers that in float64. Each of at most ``rounds`` scans finds up
    to 32 candidates on either side, which are swapped while that gains (``csrc/ops/balance.h``). A row keeps as many
    weights as before; with ``group_m`` each group of as many columns does too, which preserves an N:M pattern. ``mask
    [rows, cols]`` bool, True where kept, is written; ``weight`` is not. Returns the swaps of each row, ``[rows]``
    int64.
    """
    swaps: Tensor = registered().balance_mean_(mask, weight, variance, mean, group_m, rounds)
    return swaps


@torch.no_grad()
def restore_mean_(weight: Tensor, mask: Tensor, mean: Tensor, direction: Tensor) -> None:
    """Zeroes the weights that ``mask`` removes, and updates the others so that each row's mean output hardly changes.

    With ``s`` the sum of ``w_j mean_j`` over a row's removed weights, ``w_j += s direction_j / (1 + Σ_kept mean
    direction)`` for the kept weights. ``direction_j = mean_j / variance_j`` is optimal if columns are uncorrelated
    (``csrc/ops/restore.h``). ``weight [rows, cols]`` float32 is written, ``mask [rows, cols]`` bool is True where kept;
    ``mean`` and ``direction`` ``[cols]`` float32, their products not negative.
    """
    registered().restore_mean_(weight, mask, mean, direction)


@torch.no_grad()
def admm_change_(change: Tensor, weight: Tensor, mask: Tensor, dense: Tensor, norm: Tensor) -> None:
    """``change [rows, cols] = (weight where mask, -weight elsewhere) - dense norm``, on the CPU.

    ``change`` is float32 or bfloat16, ``mask`` bool, the others float32; ``norm [cols]``.
    """
    registered().admm_change_(change, weight, mask, dense, norm)


@torch.no_grad()
def admm_update_(weight: Tensor, product: Tensor, mask: Tensor, dense: Tensor, norm: Tensor, dual_scale: float) -> None:
    """``weight [rows, cols] = product + dense norm + (0 where mask, dual_scale weight elsewhere)``, on the CPU.

    ``product`` is float32 or bfloat16, ``mask`` bool, the others float32; ``norm [cols]``.
    """
    registered().admm_update_(weight, product, mask, dense, norm, dual_scale)


@torch.no_grad()
def obs_block_(weight: Tensor, error: Tensor, mask: Tensor, factor: Tensor, keep_n: int = 0, group_m: int = 0) -> None:
    """SparseGPT's recursion (arXiv 2301.00774) inside one block of columns, all ``[rows, width]``, float32.

    For each column c, left to right: ``d = w_c / U_cc`` where ``mask`` is False, else 0; ``w_k -= d U_ck`` for k > c;
    ``w_c = 0`` where removed; ``error_c = d``. ``factor`` ``U [width, width]`` is the block of the upper Cholesky
    factor of the inverse Hessian, with a positive diagonal; entries below it are not read. With ``keep_n`` of
    ``group_m`` columns ``mask`` is written too: at each group's first column the largest ``|w_j| / U_jj`` are kept,
    the lower column first among equals. Every tensor may be a slice of columns. ``torch.linalg.cholesky`` returns a
    transposed factor: call ``.contiguous()``.
    """
    registered().obs_block_(weight, error, mask, factor, keep_n, group_m)


@torch.no_grad()
def quantize_block_(
    weight: Tensor,
    error: Tensor,
    mask: Tensor,
    scale: Tensor,
    factor: Tensor,
    bits: int,
    current: Tensor | None = None,
) -> None:
    """GPTQ's recursion (arXiv 2210.17323) inside one block of columns ``[rows, width]`` float32 with a fixed mask.

    For each column c, left to right: ``q = w_c / scale`` rounded to a whole number from ``-2^(bits-1)`` to
    ``2^(bits-1) - 1``, ties to even, and 0 where ``mask`` is False; ``v = q scale``, multiplied in float32 and rounded
    to the dtype of ``scale``; ``d = (w_c - v) / U_cc``; ``w_k -= d U_ck`` for k > c; ``w_c = v``; ``error_c = d``.
    ``scale [rows]`` is float32, float16 or bfloat16, not negative. ``factor`` ``U [width, width]`` is the block of the
    upper Cholesky factor of the inverse Hessian, as for :func:`obs_block_`.

    With ``current [rows, width]`` float32, ``d = (v - current_c) / U_cc``: a step of a coordinate descent from
    ``current``, whose targets are in ``weight``.
    """
    registered().quantize_block_(weight, error, mask, scale, factor, bits, current)


# Errors on a GPU


def take_not_finite(device: torch.device) -> str:
    """The name of an op that met NaN, infinity or an overflowed score on a GPU since the last call, or "".

    Ops on a GPU cannot raise without waiting for it, so they set a flag there; this function waits for the current
    stream. On the CPU ops raise directly.
    """
    if device.type != "cuda":
        return ""
    name: str = compiled().take_not_finite(torch.cuda.current_device() if device.index is None else device.index)
    return name
