"""The ops, one function each: the only file that names ``torch.ops.ace_ext``.

Contracts in full: ``csrc/ops.h``. Weights are ``[rows, cols]`` float32, float16 or bfloat16 with contiguous columns;
rows are output channels. Higher score = keep; among equal scores the lower column is kept first. Functions that end in
``_`` write into their first argument; pruned entries become +0.0. All raise ``ValueError`` for bad input before
anything is written, also where a weight, factor or score is NaN or infinite (on CUDA that check is deferred).

``metric`` is a name from :data:`ace_ext.pruning.criteria.METRICS` or ``"score"``, the caller's own score given as
``moment``.
``column`` is the metric's factor of each column ``[cols]`` float32, ``moment`` a ``[rows, cols]`` float32 matrix.
"""

import torch
from torch import Tensor

from ace_ext.ops._extension import compiled

RADIX_BITS = (11, 11, 10)
"""Width of the digits that :func:`score_histogram` counts, from the top of a 32-bit key."""


def _ops():
    """The registered ops; loading the compiled module registers them."""
    compiled()
    return torch.ops.ace_ext


@torch.no_grad()
def update_moments_(
    weight_sum: Tensor, mean: Tensor, m2: Tensor, x: Tensor, token_weight: Tensor | None = None
) -> None:
    """Merges tokens ``x [T, d]`` into a weighted Welford state: ``weight_sum []``, ``mean [d]``, ``m2 [d]``.

    The state is float32 or float64; ``token_weight [T]`` float32, finite and not negative, or None for 1 each. ``m2``
    is the weighted sum of squared deviations from the weighted mean, merged by Chan, Golub and LeVeque's rule (1983).
    """
    _ops().update_moments_(x, token_weight, weight_sum, mean, m2)


@torch.no_grad()
def inverse_square_norm(a: Tensor) -> Tensor:
    """``r [T]`` float32 with ``r_t = 1 / ||a_t||^2`` for ``a [T, d]``; a row of zeros gives 0."""
    return _ops().inverse_square_norm(a)


@torch.no_grad()
def update_cosine_moment_(moment: Tensor, x: Tensor, a: Tensor) -> None:
    """``moment [d_out, d_in] += sum_t r_t^2 a_ti^2 x_tj^2`` for ``x [T, d_in]`` and ``a [T, d_out]``; float32."""
    _ops().update_cosine_moment_(x, a, moment)


@torch.no_grad()
def score(weight: Tensor, metric: str, column: Tensor | None = None, moment: Tensor | None = None) -> Tensor:
    """The scores ``[rows, cols]`` float32, stored: for looking at. The pruning ops recompute them on the fly."""
    return _ops().score(weight, metric, column, moment)


@torch.no_grad()
def prune_topk_(
    weight: Tensor,
    metric: str,
    keep_k: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
    group: str = "row",
) -> Tensor:
    """Keeps the best ``keep_k`` of each row, or of the ``"matrix"``; returns each group's smallest kept score.

    The threshold is ``[rows]`` or ``[1]`` float32, +inf where nothing is kept.
    """
    return _ops().prune_topk_(weight, metric, column, moment, keep_k, group)


@torch.no_grad()
def prune_nm_(
    weight: Tensor,
    metric: str,
    keep_n: int,
    group_m: int,
    column: Tensor | None = None,
    moment: Tensor | None = None,
) -> None:
    """Keeps the best ``keep_n`` of each ``group_m`` (at most 32) consecutive columns of every row."""
    _ops().prune_nm_(weight, metric, column, moment, keep_n, group_m)


@torch.no_grad()
def prune_by_score_(weight: Tensor, score: Tensor, keep_k: int, group: str = "row") -> Tensor:
    """:func:`prune_topk_` for a score ``[rows, cols]`` of the caller's own: float32, float16 or bfloat16."""
    return _ops().prune_by_score_(weight, score, keep_k, group)


@torch.no_grad()
def prune_nm_by_score_(weight: Tensor, score: Tensor, keep_n: int, group_m: int) -> None:
    """:func:`prune_nm_` for a score ``[rows, cols]`` of the caller's own: float32, float16 or bfloat16."""
    _ops().prune_nm_by_score_(weight, score, keep_n, group_m)


@torch.no_grad()
def score_histogram(
    weight: Tensor, metric: str, prefix: int, level: int, column: Tensor | None = None, moment: Tensor | None = None
) -> Tensor:
    """Counts ``[2 ** RADIX_BITS[level]]`` int64 of the keys that share ``prefix`` above this level, by their digit."""
    return _ops().score_histogram(weight, metric, column, moment, prefix, level)


@torch.no_grad()
def prune_at_(
    weight: Tensor, metric: str, key: int, ties: int, column: Tensor | None = None, moment: Tensor | None = None
) -> None:
    """Keeps every score whose key is above ``key``, and the first ``ties`` (row-major) whose key equals it."""
    _ops().prune_at_(weight, metric, column, moment, key, ties)


@torch.no_grad()
def refine_swaps_(
    mask: Tensor, weight: Tensor, gram: Tensor, keep_n: int = 0, group_m: int = 0, max_swaps: int = 100
) -> Tensor:
    """Exchanges kept and removed weights, row by row, while that lowers the row's loss ``e^T G e``; ``[rows]`` int64.

    ``e`` holds the row's removed weights; ``gram`` ``G [cols, cols]`` float32 is symmetric and positive semidefinite,
    contiguous. Each swap restores the removed weight whose return lowers the loss most and removes the kept weight
    that then costs least; each lowers the loss computed in float64. With ``keep_n`` of ``group_m`` the best pair of
    any group is swapped, so the pattern stays; both 0 for rows without one. ``mask [rows, cols]`` bool, True where
    kept, is written; ``weight`` is not. Returns the swaps made in each row, at most ``max_swaps``.
    """
    return _ops().refine_swaps_(mask, weight, gram, keep_n, group_m, max_swaps)


@torch.no_grad()
def obs_block_(weight: Tensor, error: Tensor, mask: Tensor, factor: Tensor, keep_n: int = 0, group_m: int = 0) -> None:
    """SparseGPT's recursion (arXiv 2301.00774) inside one block of columns, all ``[rows, width]``, float32.

    For each column c, left to right: ``d = w_c / U_cc`` where ``mask`` is False, else 0; ``w_k -= d U_ck`` for k > c;
    ``w_c = 0`` where removed; ``error_c = d``. ``factor`` ``U [width, width]`` is the block of the upper Cholesky
    factor of the inverse Hessian, with a positive diagonal; what lies below it is not read. With ``keep_n`` of
    ``group_m`` columns ``mask`` is written too: at each group's first column the largest ``|w_j| / U_jj`` are kept,
    the lower column first among equal ones. Every tensor may be a slice of columns; ``torch.linalg.cholesky`` hands
    out a transposed factor, which ``.contiguous()`` mends.
    """
    _ops().obs_block_(weight, error, mask, factor, keep_n, group_m)


def take_not_finite(device: torch.device) -> str:
    """The name of an op that met NaN, infinity or an overflowed score on a GPU since the last call, or "".

    Ops on a GPU cannot raise without waiting for it, so they note it there; asking waits for the current stream. On the
    CPU ops raise by themselves.
    """
    return compiled().take_not_finite(device.index or 0) if device.type == "cuda" else ""


# TEMPORARY until the new ops are merged
_OLD = {"scaled": "wanda", "cosp_exact": "cosp-exact"}
_new = {n: globals()[n] for n in ("score", "prune_topk_", "prune_nm_", "score_histogram", "prune_at_")}


def _renamed(function):
    def call(weight, formula, *args, **kwargs):
        return function(weight, _OLD.get(formula, formula), *args, **kwargs)

    return call


for _n, _f in _new.items():
    globals()[_n] = _renamed(_f)


def topk_mask(weight, formula, keep_k, column=None, moment=None, group="row"):
    s = globals()["score"](weight, formula, column, moment)
    kept = torch.ones_like(s, dtype=torch.bfloat16)
    prune_by_score_(kept, s, keep_k, group)
    return kept.bool()


def nm_mask(weight, formula, keep_n, group_m, column=None, moment=None):
    s = globals()["score"](weight, formula, column, moment)
    kept = torch.ones_like(s, dtype=torch.bfloat16)
    prune_nm_by_score_(kept, s, keep_n, group_m)
    return kept.bool()


def prune_topk_across_(weights, keep):
    prefix, ties, equal = 0, keep, [0] * len(weights)
    shift = sum(RADIX_BITS)
    for level, bits in enumerate(RADIX_BITS):
        shift -= bits
        counts = [
            globals()["score_histogram"](s.weight, s.formula, prefix, level, column=s.column, moment=s.moment).cpu()
            for s in weights
        ]
        if keep == 0:
            break
        from_top = sum(counts).flip(0).cumsum(0)
        position = int(torch.searchsorted(from_top, torch.tensor(ties)))
        above = int(from_top[position - 1]) if position > 0 else 0
        digit = len(from_top) - 1 - position
        prefix |= digit << shift
        ties -= above
        equal = [int(count[digit]) for count in counts]
    if keep == 0:
        prefix, ties = 2**32 - 1, 0
    for scored, available in zip(weights, equal, strict=True):
        taken = min(ties, available)
        ties -= taken
        globals()["prune_at_"](scored.weight, scored.formula, prefix, taken, column=scored.column, moment=scored.moment)
