"""What several test files share: cases, bit comparisons, the tolerance table, and programs as modules."""

import importlib
import math
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ace_ext.ops._extension import registered

OLDER_PROCESSORS = ["default", "avx2"] if torch.backends.cpu.get_cpu_capability() != "AVX2" else ["default"]
"""Values of ``ATEN_CPU_CAPABILITY`` with other loops than this processor's own."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (1, 2), (2, 1), (31, 33), (32, 32), (33, 31), (3, 129), (129, 2), (2, 1134))

COLUMN_FORMULAS = ("scaled", "ria")
MOMENT_FORMULAS = ("cosp", "cosp_exact")
FORMULAS = ("magnitude", *COLUMN_FORMULAS, *MOMENT_FORMULAS)
"""All but ``score``, the caller's own."""

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    """A program of this repository, such as ``"tools/fetch_models.py"``, as a new module."""
    file = ROOT / path
    sys.modules.pop(file.stem, None)
    sys.path.insert(0, str(file.parent))  # programs of one folder import each other
    try:
        return importlib.import_module(file.stem)
    finally:
        sys.path.remove(str(file.parent))


def rest_nightly(kept: Collection[Any], values: Iterable[Any], several: bool = False) -> list[Any]:
    """The values of a parameter, of which those of ``kept`` are tested with each change and the rest at night.
    ``several``: each is a tuple with the values of several parameters."""
    return [
        value if value in kept else pytest.param(*(value if several else (value,)), marks=pytest.mark.nightly)
        for value in values
    ]


# Cases


def make_weight(rows: int, cols: int, dtype: torch.dtype, random: torch.Generator, ties: bool = False) -> Tensor:
    """``[rows, cols]`` normal; with ``ties`` only multiples of 1/2, so that many scores are equal and some are ±0."""
    weight = torch.randn(rows, cols, generator=random)
    return ((weight * 2).round() / 2 if ties else weight).to(dtype)


def formula_arguments(formula: str, weight: Tensor, random: torch.Generator, ties: bool = False) -> dict[str, Tensor]:
    """The ``column`` and ``moment`` that the formula needs, random; with ``ties`` all equal, so that scores are too."""

    def draw(*shape: int) -> Tensor:
        return torch.full(shape, 0.25) if ties else torch.rand(*shape, generator=random) + 0.01

    arguments = {}
    if formula in COLUMN_FORMULAS + MOMENT_FORMULAS:
        arguments["column"] = draw(weight.shape[1]) + (2.0 if formula == "cosp_exact" else 0.0)
    if formula in MOMENT_FORMULAS:
        arguments["moment"] = draw(*weight.shape)
    return {name: value.to(weight.device) for name, value in arguments.items()}


def places(size: int) -> list[int]:
    """Numbers of weights to keep, for groups of ``size``: both ends, their neighbours and the middle."""
    return sorted({k for k in (0, 1, size // 2, size - 1, size) if 0 <= k <= size})


def embed(inner: Tensor) -> tuple[Tensor, Tensor]:
    """A larger matrix and the column slice of it that holds ``inner``; all around it is 7."""
    rows, cols = inner.shape
    outer = torch.full((rows, cols + 5), 7.0, dtype=inner.dtype, device=inner.device)
    view = outer[:, 3 : 3 + cols]
    view.copy_(inner)
    return outer, view


def assert_only_slice_changed(outer: Tensor, view: Tensor) -> None:
    """Checks that nothing outside ``view``, a result of :func:`embed`, was written."""
    cols = view.shape[1]
    assert (outer[:, :3] == 7).all()
    assert (outer[:, 3 + cols :] == 7).all()


def check_column_slices(
    refine: Callable[[Tensor, Tensor], object], weight: Tensor, mask: Tensor, expected: Tensor, device: str
) -> None:
    """Checks that ``refine(mask, weight)`` on column slices of larger matrices writes ``expected`` and nothing else."""
    outer, view = embed(weight.to(device))
    cols = mask.shape[1]
    outer_mask = torch.ones(len(mask), cols + 6, dtype=torch.bool, device=device)
    outer_mask[:, 2 : 2 + cols] = mask.to(device)
    refine(outer_mask[:, 2 : 2 + cols], view)
    assert torch.equal(outer_mask[:, 2 : 2 + cols].cpu(), expected)
    assert outer_mask[:, :2].all()
    assert outer_mask[:, 2 + cols :].all()
    assert_same_bits(view.cpu(), weight)
    assert_only_slice_changed(outer, view)


# Bits

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGERS[torch.bfloat16] = torch.int16


def bits(t: Tensor) -> np.ndarray:
    return t.detach().cpu().contiguous().view(_INTEGERS[t.dtype]).numpy()


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(bits(actual), bits(expected))


# The cut over several matrices, key by key: what score_histogram and prune_at_ (csrc/ops/across.h) must give


def score_histogram(weight: Tensor, formula: str, prefix: int, level: int, **arguments: Tensor) -> Tensor:
    """The op: ``[2048, 2048, 1024][level]`` int64."""
    return registered().score_histogram(weight, formula, prefix, level, **arguments)


def prune_at_(weight: Tensor, formula: str, key: int, ties: int, **arguments: Tensor) -> None:
    """The op."""
    registered().prune_at_(weight, formula, key, ties, **arguments)


def order_key(score: Tensor) -> np.ndarray:
    """Float32 scores as uint32 in the same order, -0.0 as +0.0: positives get the sign bit, others all bits flipped."""
    bits = (score.detach().cpu().to(torch.float32) + 0.0).numpy().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def expected_histogram(score: Tensor, prefix: int, level: int) -> Tensor:
    """``[2048, 2048, 1024][level]`` int64: how many keys agree with ``prefix`` above the level, by their digit."""
    shift, bits = ((21, 11), (10, 11), (0, 10))[level]
    keys = order_key(score).reshape(-1).astype(np.int64)
    alike = keys[keys >> (shift + bits) == prefix >> (shift + bits)]
    return torch.from_numpy(np.bincount(alike >> shift & (2**bits - 1), minlength=2**bits))


def expected_mask_at(score: Tensor, key: int, ties: int) -> Tensor:
    """``[rows, cols]`` bool: keys above ``key``, and the first ``ties`` (row-major) equal to it."""
    keys = order_key(score).astype(np.int64)
    equal = keys == key
    first = equal & (np.cumsum(equal).reshape(keys.shape) <= ties)
    return torch.from_numpy((keys > key) | first)


# Tolerances. u = 2^-24 is the rounding of one float32 operation; every bound is a count of such roundings, each derived
# below, and absolute where it returns a tensor. A failing test means a wrong count or a wrong op, never a wider number.

UNIT = 2.0**-24
BLOCK = 64
"""Tokens that an op may sum in float32 before it merges them into the state."""

SCORE_ROUNDINGS = 4
"""The longest formulas. ria: a sum rounded from float64 (1), the division by it (1), the sum of two such terms (1) and
the product (1). cosp: ``|W| c`` (1), the square root and its product with ``|W|`` (2), the product of both (1).
cosp-exact: the difference of given numbers (1), halved without rounding, the square root (1), the product (1)."""


def moment_bounds(x: Tensor, token_weight: Tensor | None, state: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute bounds on ``weight_sum``, ``mean`` and ``m2`` of :func:`ops.update_moments_` from an empty state.

    The chain of float32 roundings a value goes through is n long: the tokens of one block, and with a float32 state one
    more for each block merged; a float64 state adds nothing that counts. A step rounds at most 4 times.

    - weight_sum: n roundings of the running sum.
    - mean: a step rounds relative to the running sum of ``w|x|``, which the last one bounds: 4 n u (sum w|x|) / w.
    - m2: the bound of Chan, Golub and LeVeque (1983) for updating and pairwise rules is n u kappa relative, with
      ``kappa^2 = (sum w x^2) / M2``; its second-order term, n^2 u^2 kappa^2, is all there is where M2 vanishes. (The
      textbook rule ``E[x^2] - E[x]^2`` has kappa^2 in first order.)
    """
    x = x.cpu().double()
    w = torch.ones(len(x), dtype=torch.float64) if token_weight is None else token_weight.cpu().double()
    total = w.sum()
    blocks = math.ceil(len(x) / BLOCK) if state == torch.float32 else 0
    unit = 4 * UNIT * (min(len(x), BLOCK) + blocks)
    mean = (w[:, None] * x).sum(0) / total
    squares = (w[:, None] * x**2).sum(0)
    m2 = (w[:, None] * (x - mean) ** 2).sum(0)
    return unit * total, unit * (w[:, None] * x.abs()).sum(0) / total, unit * (squares * m2).sqrt() + unit**2 * squares


def inverse_square_norm_bound(width: int) -> float:
    """Relative: a square (1), at worst ``width - 1`` additions in float32, the division and the result (2)."""
    return UNIT * (width + 2)


def cosine_moment_bound(tokens: int, d_out: int) -> float:
    """Relative: all terms are positive, so errors do not cancel up. ``r`` as above and squared (2 of its bounds), its
    product with ``a`` and the square of that (3), the square of ``x`` (1), the product (1), ``tokens`` additions."""
    return 2 * inverse_square_norm_bound(d_out) + UNIT * (5 + tokens)


def admm_change(weight: Tensor, mask: Tensor, dense: Tensor, norm: Tensor) -> Tensor:
    """What :func:`ops.admm_change_` writes, before it is rounded to ``change``: the formula, bit for bit."""
    return torch.where(mask, weight, -weight) - dense * norm


def admm_update(
    weight: Tensor, product: Tensor, mask: Tensor, dense: Tensor, norm: Tensor, dual_scale: float
) -> Tensor:
    """What :func:`ops.admm_update_` makes of ``weight``: the formula, bit for bit."""
    return product.float() + dense * norm + torch.where(mask, 0.0, torch.tensor(dual_scale) * weight)


def gram_bound(x: Tensor) -> Tensor:
    """Absolute: a product of two float32 numbers is rounded (1), and ``tokens`` additions, of terms of either sign."""
    return UNIT * (1 + len(x)) * (x.double().abs().T @ x.double().abs())


def obs_bounds(weight: Tensor, mask: Tensor, factor: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute bounds on ``weight`` and ``error`` of :func:`ops.obs_block_`, given the exact ``error``.

    A row's errors d solve ``U_PP^T d = w_P`` by forward substitution, P its removed columns, which Higham (Accuracy and
    Stability of Numerical Algorithms, theorem 8.5) bounds: ``|delta d| <= g |U_PP^-T| |U_PP^T| |d|`` with
    ``g = n u / (1 - n u)``, n roundings at most for each term: a product, ``width - 1`` subtractions, the division. A
    kept weight ``w_k - sum_c d_c U_ck`` adds its own: ``g (|w_k| + sum_c |d_c U_ck|) + sum_c |delta d_c U_ck|``. The
    second-order term, |d| computed instead of exact, is one more unit of n.
    """
    weight, factor, error = weight.double(), factor.double().triu(), error.double()
    n = weight.shape[1] + 2
    unit = n * UNIT / (1 - n * UNIT)
    errors = torch.zeros_like(error)
    for i, kept in enumerate(mask):
        removed = ~kept
        square = factor[removed][:, removed].T
        errors[i, removed] = unit * torch.linalg.inv(square).abs() @ (square.abs() @ error[i, removed].abs())
    weights = unit * (weight.abs() + error.abs() @ factor.abs()) + errors @ factor.abs()
    return torch.where(mask, weights, 0.0), errors


def input_rounding(x: Tensor, group: int) -> Tensor:
    """At most this far ``quantized_linear`` rounds each x: 1/32639 of the largest of its 64 or 128 columns.

    0 for float32, for more than 16 tokens, and for processors without AVX2.
    """
    shorter = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and x.dtype != torch.float32
    if not shorter or len(x) > 16 or not x.numel():
        return torch.zeros(x.shape, dtype=torch.float64)
    span = 64 if group % 128 else 128
    largest = [part.abs().amax(1, keepdim=True).expand_as(part) for part in x.double().split(span, dim=1)]
    return torch.cat(largest, dim=1) / 32639 + 2.0**-127
