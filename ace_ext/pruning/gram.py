"""The Gram matrix of a Linear's inputs, ``G = Σ_t w_t X_t X_tᵀ``, and the factorisations that the solvers share.

With it the weights ``e`` removed from a row cost ``e G eᵀ``, the squared error of that row's output. ``w_t = 1``
counts every token alike; ``w_t = r_t = 1 / ‖A_t‖²``, ``A`` the dense output, makes it the error relative to the token's
output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext.errors import InputError

RHO = 1.0
"""ADMM's penalty, on a Gram matrix normalised to a diagonal of ones."""
MAX_ATTEMPTS = 8
LOSS_ROWS = 1024
"""How many rows an error is measured on at a time, in float64."""
LEAST_DAMPING = 1e-6
"""What a factorisation that failed undamped is tried with next."""


@dataclass(frozen=True)
class ObsFactor:
    """For the column-by-column update."""

    upper: Tensor  # [d, d] float32, upper triangular: (G + damping)⁻¹ = upperᵀ upper
    dead: Tensor  # [d] bool: inputs that were never other than zero
    damping: float  # relative to the mean diagonal, as it succeeded
    attempts: int


@dataclass(frozen=True)
class AdmmFactor:
    """For ADMM, on columns divided by ``norm``, so that G's diagonal is 1: ``H = G / norm / normᵀ + damping``."""

    norm: Tensor  # [d] float32: sqrt(G_jj), 1 for a dead column
    hessian: Tensor  # [d, d] float32: H
    inverse: Tensor  # [d, d] float32: (H + RHO)⁻¹
    inverse_diagonal: Tensor  # [d] float32: the diagonal of H⁻¹
    dead: Tensor  # [d] bool
    damping: float
    attempts: int


class GramState:
    """Running ``matrix [d, d]`` float32, a sum and not a mean, of the tokens seen so far, and their number.

    Linears that share a state share its factorisations too: the first to ask pays.

    Products obey ``torch.backends.cuda.matmul``. With TF32 allowed there (it is not by default) factors are rounded to
    10 bits of mantissa and still summed in float32: unweighted bfloat16 and float16 inputs lose nothing, others a
    relative 2⁻¹¹ an entry, far below the damping.
    """

    CHUNK_TOKENS = 4096
    """How many tokens are widened to float32 at a time."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.tokens = 0
        self._obs: dict[float, ObsFactor] = {}  # by damping
        self._admm: dict[float, AdmmFactor] = {}

    def update(self, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Adds tokens ``x [T, d]``, each of weight ``token_weight [T]`` float32, not negative, or 1."""
        for start in range(0, len(x), self.CHUNK_TOKENS):
            part = slice(start, start + self.CHUNK_TOKENS)
            rows = x[part].float()
            if token_weight is not None:
                rows = rows * token_weight[part].sqrt()[:, None]
            self.matrix.addmm_(rows.T, rows)
        self.tokens += len(x)
        self._forget_factors()

    def merge_(self, other: "GramState") -> None:
        """Adds another state's tokens, as those of a data-parallel rank."""
        self.matrix += other.matrix.to(self.matrix.device)
        self.tokens += other.tokens
        self._forget_factors()

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: what a file gets."""
        return {"matrix": self.matrix, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "GramState":
        state = cls(0, tensors["matrix"].device)
        state.matrix, state.tokens = tensors["matrix"], int(tensors["tokens"])
        return state

    def relative_loss(self, dense: Tensor, pruned: Tensor) -> float:
        """``Σ_i e_i G e_iᵀ / Σ_i w_i G w_iᵀ`` for ``w = dense [rows, d]`` float32 and ``e = pruned - dense``; 0 where
        the dense output is zero on every token."""
        lost, total = torch.zeros(2, dtype=torch.float64, device=dense.device)
        for rows, kept in zip(torch.split(dense, LOSS_ROWS), torch.split(pruned, LOSS_ROWS), strict=True):
            lost += self._energy(kept - rows)
            total += self._energy(rows)
        return float(lost / total) if total > 0 else 0.0

    def _energy(self, rows: Tensor) -> Tensor:
        return (rows @ self.matrix).mul_(rows).sum(dtype=torch.float64)

    def obs_factor(self, damping: float) -> ObsFactor:
        """Raises: InputError, as :func:`_inverse_factor` does."""
        if damping not in self._obs:
            self._obs[damping] = self._make_obs_factor(damping)
        return self._obs[damping]

    def admm_factor(self, damping: float) -> AdmmFactor:
        """Raises: InputError, as :func:`_inverse_factor` does."""
        if damping not in self._admm:
            self._admm[damping] = self._make_admm_factor(damping)
        return self._admm[damping]

    def _forget_factors(self) -> None:
        self._obs.clear()
        self._admm.clear()

    def _make_obs_factor(self, damping: float) -> ObsFactor:
        matrix = self.matrix.double()
        diagonal = matrix.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
        upper, damping, attempts = _inverse_factor(matrix, damping)
        return ObsFactor(upper.float().contiguous(), dead, damping, attempts)

    def _make_admm_factor(self, damping: float) -> AdmmFactor:
        matrix = self.matrix.double()
        dead = matrix.diagonal() == 0
        norm = matrix.diagonal().sqrt().masked_fill(dead, 1.0)
        matrix /= norm
        matrix /= norm[:, None]
        matrix.diagonal()[dead] = 1.0
        upper, damping, attempts = _inverse_factor(matrix, damping)
        inverse_diagonal = upper.square_().sum(0).float()
        del upper
        matrix.diagonal().add_(damping)
        hessian = matrix.float()
        matrix.diagonal().add_(RHO)
        lower = torch.linalg.cholesky(matrix)
        inverse = torch.cholesky_inverse(lower, out=matrix.mT)  # as columns, which is how LAPACK takes and gives them
        return AdmmFactor(norm.float(), hessian, inverse.float(), inverse_diagonal, dead, damping, attempts)


def _cholesky_reversed(matrix: Tensor, added: Tensor) -> tuple[Tensor, bool]:
    """``R [d, d]`` upper triangular with ``matrix + added · I = R Rᵀ``, and whether there is none."""
    backwards = matrix.flip(0, 1)
    backwards.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(backwards)
    del backwards  # freed now: this copy sets the peak
    return lower.flip(0, 1), bool(failed)


def _inverse_factor(matrix: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """``upper [d, d]`` with ``(matrix + damping · mean diagonal)⁻¹ = upperᵀ upper``, the damping and the attempts.

    Cholesky's ``L Lᵀ`` of the matrix with its order reversed is, reversed back, ``R Rᵀ`` with R upper triangular, and
    ``upper = R⁻¹``: one factorisation, where that of an explicit inverse takes three steps and may fail at the last.

    Args:
        matrix: ``[d, d]`` float64, symmetric, its diagonal positive. Left as it is.

    Raises:
        InputError: if it is not positive definite (say by rounding, with fewer tokens than columns) with any damping
            up to 10⁷ times the one asked for.
    """
    mean = matrix.diagonal().mean()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        factor, failed = _cholesky_reversed(matrix, damping * mean)
        if not failed:
            upper = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device).mT  # solved in place: by columns
            torch.linalg.solve_triangular(factor, upper, upper=True, out=upper)
            if torch.isfinite(upper.sum()):
                return upper, damping, attempt
        last, damping = damping, max(10 * damping, LEAST_DAMPING)
    raise InputError(
        f"the Gram matrix of the inputs must become positive definite by damping (got none with up to {last:g} of its "
        f"mean diagonal of {float(mean):g}); look for NaN or overflow in the activations"
    )
