"""Products with symmetric matrices on a CPU: only one of two equal halves is computed, by blocks of columns.

A matrix product on a CPU takes time in proportion to its multiplications, so half of them save almost half of the time.
A GPU computes one large product; whether halves would be faster there was not measured.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCKS = 8
"""Blocks of a large matrix. With n blocks, a share of ``(n + 1) / 2n`` of the multiplications is left."""
LEAST_BLOCK = 96
"""Columns of a block, except the last: with fewer, products of blocks are slow."""


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of columns."""
    width = max(LEAST_BLOCK, -(-columns // BLOCKS))
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def energy(matrix: Tensor, rows: Tensor) -> Tensor:
    """The sum of ``e_i G e_iᵀ`` over ``rows e [n, d]``, where ``G`` is the symmetric ``matrix [d, d]``: ``[]``
    float64. The products are computed in the dtype of both."""
    if not matrix.is_cpu:
        return (rows @ matrix).mul_(rows).sum(dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for start, end in _blocks(len(matrix)):
        own, product = rows[:, start:end], rows[:, :start] @ matrix[:start, start:end]  # zero for the first block
        product.addmm_(own, matrix[start:end, start:end], beta=2)  # the half that is left out has the same sum
        total += product.mul_(own).sum(dtype=torch.float64)
    return total


def inverse(matrix: Tensor) -> Tensor | None:
    """The inverse of a symmetric positive definite ``matrix [d, d]`` in its dtype, by Cholesky's factorisation; None if
    the matrix is not positive definite or not finite. The inverse is written into the matrix: two matrices are the peak
    of the memory."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        return None
    torch.cholesky_inverse(lower, out=matrix.mT)  # LAPACK is column-major: .mT avoids a copy
    return matrix if bool(torch.isfinite(matrix.sum())) else None
