"""Products with symmetric matrices, and their inverses.

On a CPU only one of two equal halves is computed, by blocks of columns: a matrix product there takes time in proportion
to its multiplications, so half of them save almost half of the time. A GPU computes one large product; whether halves
would be faster there was not measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 8
"""Blocks of a large matrix. With n blocks, a share of ``(n + 1) / 2n`` of the multiplications is left."""
LEAST_BLOCK = 96
"""Columns of a block, except the last: with fewer, products of blocks are slow."""
LEAST_DIVIDED = 640
"""Columns of the smallest matrix that :func:`inverse_factor_` and :func:`invert_damped_` divide."""


@dataclass(frozen=True)
class LowRank:
    """``diag(diagonal) + sign · Fᵀ F``, where ``F`` holds the directions."""

    diagonal: Tensor  # [d] float32
    directions: Tensor  # F [p, d] float32
    sign: int = 1

    def times(self, rows: Tensor) -> Tensor:
        """``rows M`` for this matrix M and ``rows [n, d]``."""
        return (rows * self.diagonal).addmm_(rows @ self.directions.T, self.directions, alpha=self.sign)


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of columns."""
    width = max(LEAST_BLOCK, -(-columns // BLOCKS))
    for start in range(0, columns, width):
        yield start, min(start + width, columns)


def energy(matrix: Tensor, rows: Tensor) -> Tensor:
    """The sum of ``e_i G e_iᵀ`` over ``rows e [n, d]``, where ``G`` is the symmetric ``matrix [d, d]``: ``[]``
    float64. The products are computed in the dtype of both."""
    if not matrix.is_cpu:
        return (rows @ matrix).mul_(rows).sum(1).sum(dtype=torch.float64)  # a copy of all of it in float64 is avoided
    total = torch.zeros((), dtype=torch.float64)
    for start, end in _blocks(len(matrix)):
        own, product = rows[:, start:end], rows[:, :start] @ matrix[:start, start:end]  # zero for the first block
        product.addmm_(own, matrix[start:end, start:end], beta=2)  # the half that is left out has the same sum
        total += product.mul_(own).sum(1).sum(dtype=torch.float64)
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


def inverse_factor_(matrix: Tensor) -> bool:
    """Replaces a symmetric positive definite ``matrix [d, d]`` by the upper triangular ``U`` with ``matrix⁻¹ = Uᵀ U``;
    False, with other contents, if it is not positive definite.

    With ``matrix = R Rᵀ``, ``R`` upper triangular, ``U = R⁻¹``. A large matrix on a CPU is divided into four: the
    factors of the last quarter and of the Schur complement give its own by products of triangles, half of which are
    zeros. Two matrices are the peak of the memory.
    """
    half = len(matrix) // 2
    if len(matrix) < LEAST_DIVIDED or not matrix.is_cpu:
        return _inverse_factor_at_once_(matrix)
    first, cross, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not inverse_factor_(second):
        return False
    product = torch.empty_like(cross)  # R₁₂, the upper right quarter of R
    for start, end in _blocks(len(second)):
        product[:, start:end] = cross[:, start:] @ second[start:end, start:].T
    _subtract_symmetric_(first, product, product.T)
    if not inverse_factor_(first):
        return False
    for start, end in _blocks(len(second)):
        cross[:, start:end] = product[:, :end] @ second[:end, start:end]
    for start, end in _blocks(half):
        torch.mm(first[start:end, start:], cross[start:], out=product[start:end])
    torch.neg(product, out=cross)
    matrix[half:, :half] = 0
    return True


def _inverse_factor_at_once_(matrix: Tensor) -> bool:
    """:func:`inverse_factor_` by LAPACK. With rows and columns in reverse order its lower factor is ``R``, reversed."""
    backwards = matrix.flip(0, 1)
    lower, failed = matrix.mT, torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(backwards, out=(lower, failed))  # LAPACK is column-major: .mT avoids a copy
    if bool(failed):
        return False
    del backwards
    factor = lower.flip(0, 1)
    matrix.zero_().diagonal().fill_(1.0)
    torch.linalg.solve_triangular(factor.mT, matrix.mT, upper=False, out=matrix.mT)
    return True


def invert_damped_(matrix: Tensor, rounded: torch.dtype = torch.float32) -> bool:
    """Replaces a symmetric positive definite ``matrix [d, d]`` float32 by its inverse; False, with other contents, if
    it is not positive definite or not finite.

    On a CPU a large matrix is divided into four, and the inverse of its first quarter and of the Schur complement give
    its own: matrix products in place of LAPACK's factorisation, twice as fast as :func:`inverse` at 2,048 columns. The
    error grows with the square of the condition number, there with the number itself. So the least eigenvalue should
    not be far below the diagonal.

    Args:
        matrix: contiguous columns.
        rounded: to which dtype the result will be rounded. With bfloat16 the last products are computed in it. Those on
            which a difference of large numbers depends are in float32.
    """
    columns = len(matrix)
    if columns < LEAST_DIVIDED or not matrix.is_cpu:
        return inverse(matrix) is not None
    half = columns // 2
    first, cross, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not invert_damped_(first):
        return False
    product = cross @ first
    _subtract_symmetric_(second, product, cross.T)
    if not invert_damped_(second, rounded):
        return False
    product = product.to(rounded)
    last = second.to(rounded) @ product
    _subtract_symmetric_(first, product.T, last.neg_())
    cross.copy_(last)
    matrix[:half, half:] = last.T
    return True


def power_diagonals(matrix: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonals of ``M²``, ``M³`` and ``M⁴`` of a symmetric ``matrix M [d, d]`` float32: three vectors ``[d]``.
    They take one half of the product ``M²``, which is computed in the dtype ``products``."""
    second = torch.linalg.vector_norm(matrix, dim=1).square_()
    third, fourth = torch.zeros_like(second), torch.zeros_like(second)
    rounded = matrix.to(products)
    for start, end in _blocks(len(matrix)):
        square = (rounded[:end] @ rounded[:, start:end]).float()
        for total, part in ((third, square * matrix[:end, start:end]), (fourth, square.square_())):
            total[start:end] += part.sum(0)
            total[:start] += part[:start].sum(1)  # the other half
    return second, third, fourth


def _subtract_symmetric_(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """``matrix -= left right`` for a symmetric ``matrix [d, d]`` and a symmetric product, which is computed in the
    dtype of its factors."""
    for start, end in _blocks(len(matrix)):
        matrix[start:end, :end] -= left[start:end] @ right[:, :end]
        matrix[:start, start:end] = matrix[start:end, :start].T
