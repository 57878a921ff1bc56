"""The Gram matrix of a Linear's inputs, ``G = Σ_t s_t² X_t X_tᵀ``, and the factorisations that the solve stages share.

A change ``e`` of a row has the squared output error ``e G eᵀ``. With ``s_t = 1`` all tokens count the same. With
``s_t`` near ``1 / ‖A_t‖``, where ``A`` is a dense output, the error is relative to each token's output.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.pruning.damping import floor_energy, penalty
from ace_ext.pruning.scaling import InputScale, times_power, times_power_
from ace_ext.pruning.symmetric import LowRank, energy, inverse_factor_, invert_damped_, power_diagonals

MAX_ATTEMPTS = 8
"""How many factorisations are tried. Each has ten times the damping of the one before."""
MASKED_AT_ONCE = 2**16
"""Entries of a weight that :func:`masked` multiplies at a time."""

LOSS_ROWS = 1024
"""Rows whose error is computed at a time, to limit memory."""
CHUNK_TOKENS = 4096
"""Tokens that are converted to float32 at a time. Tensor cores may truncate within such a chunk; the sum of chunks is
rounded to nearest."""
LEAST_DAMPING = 1e-6
"""The damping of the second attempt if that of the first was less than a tenth of it."""

DEAD = 2.0**-100
"""The factor of the weights of a dead column (its input was always zero) while a stage solves for the mask. They then
rank below all other weights, and among themselves by magnitude."""


@dataclass(frozen=True)
class ObsFactor:
    """The factor of the inverse Gram matrix for the column-by-column update."""

    upper: Tensor  # [d, d] float32, upper triangular: (G + damping)⁻¹ = upperᵀ upper
    dead: Tensor  # [d] bool: inputs that were zero for every token
    damping: float  # the value with which the factorisation succeeded, relative to the mean diagonal
    attempts: int


@dataclass(frozen=True)
class AdmmFactor:
    """For ADMM, on columns divided by ``norm``, so that the diagonal of G with its floor is 1:
    ``H = (G + floor) / norm / normᵀ + damping``.

    An iteration takes ``Z - U`` to ``a W + (1 - a) Z + (a - 1) U``, where a is the relaxation and
    ``W = (H W₀ + ρ (Z - U)) (H + ρ)⁻¹ = W₀ + ρ (Z - U - W₀) (H + ρ)⁻¹``. In the second form the product is with a
    difference, in which a strong common direction of the inputs is not amplified: bfloat16 is enough for it. So the
    result is ``W₀ + (Z - U - W₀) S`` with ``S = a ρ (H + ρ)⁻¹ + (1 - a)``.

    The diagonal of H⁻¹ would need an inverse of its own. It is approximated by that of its series in
    ``P = (H + ρ)⁻¹`` (:func:`_diagonal_without`).
    """

    norm: Tensor  # [d] float32: sqrt(G_jj + floor), DEAD for a dead column
    step: Tensor | LowRank  # S: [d, d] float32 or bfloat16, or of a sketch
    inverse_diagonal: Tensor | None  # [d] float32: the diagonal of H⁻¹, or its approximation; None: not asked for
    dead: Tensor  # [d] bool
    damping: float
    attempts: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return torch.float32 if isinstance(self.step, LowRank) else self.step.dtype

    def times(self, change: Tensor) -> Tensor:
        """``change S`` for ``change [rows, d]``, both of :attr:`dtype`."""
        return self.step.times(change) if isinstance(self.step, LowRank) else change @ self.step


class GramState:
    """The Gram matrix of the tokens seen so far, ``matrix [d, d]`` float32 (a sum, not a mean), and their number.

    ``G = 4^scale.power matrix``. The power is 0 unless inputs are very small or very large
    (:mod:`ace_ext.pruning.scaling`). Stages and relative losses do not depend on it.

    Linears that share a state share its factorisations too: each is computed once, on first use.

    Unweighted bfloat16 inputs are multiplied exactly and summed in float32, on a GPU also float16
    (:func:`multiplies_exactly`; not run on a GPU). Other products follow ``torch.backends.cuda.matmul``. If TF32 is
    enabled there (it is not by default), inputs are rounded to 10 bits of mantissa: a relative error of 2⁻¹¹ per entry,
    far below the damping.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self._matrix = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mirrored = True  # else the upper half of _matrix is out of date
        self.scale = InputScale()
        self.tokens = 0
        self._obs: dict[float, ObsFactor] = {}  # by damping
        self._admm: dict[tuple[float, float, float, torch.dtype, bool], AdmmFactor] = {}  # by what admm_factor takes

    @property
    def matrix(self) -> Tensor:
        """``[d, d]`` float32, symmetric. Read it again after an update."""
        if not self._mirrored:
            ops.update_gram_(self._matrix, self._matrix.new_empty(0, len(self._matrix)))
            self._mirrored = True
        return self._matrix

    @matrix.setter
    def matrix(self, matrix: Tensor) -> None:
        self._matrix, self._mirrored = matrix, True

    def update(self, x: Tensor, token_scale: Tensor | None = None) -> None:
        """Adds tokens ``x [T, d]``, each multiplied by its ``token_scale [T]`` float32: powers of two or 0; None: 1."""
        exact = multiplies_exactly(x) and (token_scale is None or x.dtype == torch.bfloat16)
        for part in scaled_rows(x, token_scale, x.dtype if exact else torch.float32):
            rows = self._scaled(part)
            if rows.is_cpu:
                ops.update_gram_(self._matrix, rows.contiguous(), mirror=False)
                self._mirrored = False
            elif exact:
                torch.addmm(self.matrix, rows.T, rows, out_dtype=torch.float32, out=self.matrix)
            else:
                self.matrix.addmm_(rows.T, rows)
        self.tokens += len(x)
        self._forget_factors()

    def _scaled(self, rows: Tensor) -> Tensor:
        """``rows [T, d]`` divided by ``2^scale.power``. The power is raised first if these rows need it."""
        times_power_(self._matrix, -2 * self.scale.admit(rows))
        return times_power(rows, -self.scale.power)

    def raise_scale_(self, exponent: int) -> None:
        """Raises ``scale.exponent`` to at least ``exponent``, so that states of several processes can be added."""
        times_power_(self._matrix, -2 * self.scale.raise_to(exponent))

    def merge_(self, other: "GramState") -> None:
        """Adds the tokens of another state, such as that of another data-parallel rank."""
        lower = 0
        if other.scale.exponent is not None:
            self.raise_scale_(other.scale.exponent)
            lower = 2 * (other.scale.power - self.scale.power)
        self.matrix += times_power(other.matrix.to(self.matrix.device), lower)
        self.tokens += other.tokens
        self._forget_factors()

    def sums(self) -> list[Tensor]:
        """The tensors to sum over data-parallel ranks."""
        return [self.matrix]

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, for a statistics file."""
        return {"matrix": self.matrix, "tokens": torch.tensor(self.tokens), **self.scale.tensors()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "GramState":
        """The state of :meth:`tensors`. It uses the given matrix itself, not a copy."""
        state = cls(0, tensors["matrix"].device)
        state.matrix, state.tokens = tensors["matrix"], int(tensors["tokens"])
        state.scale = InputScale.of_tensors(tensors)
        return state

    def energy(self, rows: Tensor) -> Tensor:
        """``Σ_i e_i G e_iᵀ`` of ``rows e [n, d]`` float32, divided by ``4^scale.power``: ``[]`` float64."""
        return energy(self.matrix, rows)

    def obs_factor(self, damping: float) -> ObsFactor:
        """The factor for the column-by-column update, computed on first use.

        Raises:
            InputError: the matrix is not positive definite with any of the dampings.
        """
        if damping not in self._obs:
            self._obs[damping] = self._make_obs_factor(damping)
        return self._obs[damping]

    def admm_factor(
        self,
        damping: float,
        floor: float = 0.0,
        relaxation: float = 1.0,
        products: torch.dtype = torch.float32,
        diagonal: bool = True,
    ) -> AdmmFactor:
        """The factor for ADMM, computed on first use.

        Args:
            damping: added to the diagonal of the normalised matrix.
            floor: as in :func:`ace_ext.pruning.damping.floor_energy`.
            relaxation: 1 for none.
            products: the dtype of ADMM's products, float32 or bfloat16.
            diagonal: whether the diagonal of H⁻¹ is needed: half of a matrix product.

        Raises:
            InputError: the matrix is not positive definite with any of the dampings.
        """
        key = damping, floor, relaxation, products, diagonal
        if key not in self._admm:
            self._admm[key] = self._make_admm_factor(*key)
        return self._admm[key]

    def _forget_factors(self) -> None:
        self._obs.clear()
        self._admm.clear()

    def _make_obs_factor(self, damping: float) -> ObsFactor:
        dead = self.matrix.diagonal() == 0

        def matrix() -> Tensor:
            made = self.matrix.double()
            diagonal = made.diagonal()
            diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
            return made

        upper, damping, attempts = _inverse_factor(matrix, damping)
        return ObsFactor(upper.float().contiguous(), dead, damping, attempts)

    def _make_admm_factor(
        self, damping: float, floor: float, relaxation: float, products: torch.dtype, diagonal: bool
    ) -> AdmmFactor:
        energies = self.matrix.diagonal().double()
        dead, least = energies == 0, floor_energy(energies, floor)
        norm = (energies + least).sqrt().masked_fill(dead, DEAD)

        def inverse(by: float) -> Tensor | None:
            made = self.matrix.clone()
            made.diagonal().add_(least)
            made /= norm.float()
            made /= norm.float()[:, None]
            made.diagonal()[dead] = 1.0
            made.diagonal().add_(by + penalty(by))
            return made if invert_damped_(made, products) else None

        step, damping, attempts = _damped_until(inverse, damping, lambda: float(energies.mean()))
        rho = penalty(damping)
        of_inverse = _diagonal_without(rho, step, damping, products) if diagonal else None
        step.mul_(relaxation * rho).diagonal().add_(1 - relaxation)
        return AdmmFactor(norm.float(), step.to(products), of_inverse, dead, damping, attempts)


def _diagonal_without(rho: float, inverse: Tensor, damping: float, products: torch.dtype) -> Tensor:
    """The diagonal ``[d]`` of H⁻¹, approximately, from the ``inverse P = (H + ρ)⁻¹``: ``H⁻¹ = P + ρ P² + ρ² P³ + …``.
    From the fifth term on, it is taken for a geometric series, with the ratio of the fourth term to the third."""
    terms = [rho**power * diagonal for power, diagonal in enumerate(power_diagonals(inverse, products), start=1)]
    most = min(rho / (rho + damping), 1 - 2.0**-10)  # the ratio of the least eigenvalue of H
    ratio = (terms[2] / terms[1]).clamp_max(most)
    return inverse.diagonal() + terms[0] + terms[1] + terms[2] / (1 - ratio)


def multiplies_exactly(x: Tensor) -> bool:
    """Whether the device multiplies these inputs as they are and sums in float32: float16 and bfloat16 on a GPU,
    bfloat16 on a CPU (:func:`ace_ext.ops.update_gram_`, which converts it where there are no instructions for it).

    A product of two such numbers has at most 22 bits of mantissa, so float32 holds it. If a matrix product is split
    over tokens, its parts are summed in the output's dtype, float32, whatever
    ``allow_bf16_reduced_precision_reduction`` says. That flag concerns outputs below the accumulator's precision
    (cuBLAS's manual, ``CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION``). With ``allow_fp16_accumulation``, float16
    would be summed in float16.
    """
    if x.device.type != "cuda":
        return x.device.type == "cpu" and x.dtype == torch.bfloat16
    return x.dtype == torch.bfloat16 or (
        x.dtype == torch.float16 and not torch.backends.cuda.matmul.allow_fp16_accumulation
    )


def scaled_rows(
    x: Tensor, token_scale: Tensor | None, dtype: torch.dtype = torch.float32, at_once: int | None = None
) -> Iterator[Tensor]:
    """``x [T, d]`` in chunks of ``at_once`` tokens (None: ``CHUNK_TOKENS``), converted to ``dtype``; then each row is
    multiplied by its ``token_scale [T]`` (None: 1), a power of two, so no bfloat16 is rounded. A chunk may be a view of
    ``x``."""
    at_once = at_once or CHUNK_TOKENS
    for start in range(0, len(x), at_once):
        part = slice(start, start + at_once)
        rows = x[part].to(dtype)
        yield rows if token_scale is None else rows * token_scale[part, None].to(dtype)


def masked(weight: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """``weight * mask`` in ``out``, which may be ``weight``; all are ``[rows, d]``, the mask bool, the others float32.
    Zeros may be -0.0.

    On a CPU this is over four times as fast as ``masked_fill``, which has a branch for each entry. The mask is
    converted to float32 a few rows at a time.
    """
    step = max(1, MASKED_AT_ONCE // weight.shape[1]) if weight.is_cpu else max(1, len(weight))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        torch.mul(weight[part], mask[part], out=out[part])
    return out


def restore_dead_(weight: Tensor, dense: Tensor, mask: Tensor, dead: Tensor) -> None:
    """Sets the kept weights of dead columns to their dense values, in place: no stage changes them.

    A dead column ranks lowest (:data:`DEAD`). A mask keeps its weight only if the group has too few other weights.

    Args:
        weight: ``[rows, d]`` float32.
        dense: the same before pruning.
        mask: ``[rows, d]`` bool, True where a weight is kept.
        dead: ``[d]`` bool.
    """
    columns = dead.nonzero().flatten()
    weight[:, columns] = dense[:, columns].masked_fill(~mask[:, columns], 0.0)


class RelativeLoss:
    """``energy(pruned - dense) / energy(dense)`` for one dense weight and several pruned ones. ``energy`` is the sum of
    ``e G eᵀ`` over rows ``e [n, d]``. The loss is 0 if the dense output is zero for every token. The energy of the
    dense weight is computed once.

    Args:
        energy: the energy of some rows, ``[]`` float64.
        dense: ``[rows, d]`` float32.
        add_up: sums the energies of all processes; each has a share of the rows.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        dense: Tensor,
        add_up: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> None:
        self._energy, self._dense, self._add_up = energy, dense, add_up
        self._total = self._sum(energy(rows) for rows in torch.split(dense, LOSS_ROWS))

    def __call__(self, pruned: Tensor) -> float:
        """The loss of ``pruned [rows, d]``. It is converted to float32 a few rows at a time."""
        parts = zip(torch.split(self._dense, LOSS_ROWS), torch.split(pruned, LOSS_ROWS), strict=True)
        lost = self._sum(self._energy(kept.float() - rows) for rows, kept in parts)
        return float(torch.where(self._total > 0, lost / self._total, 0.0))

    def _sum(self, parts: Iterator[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._dense.device)
        for part in parts:
            total += part
        return self._add_up(total)


def _inverse_factor(make: Callable[[], Tensor], damping: float) -> tuple[Tensor, float, int]:
    """Returns ``upper [d, d]`` with ``(matrix + damping · mean diagonal)⁻¹ = upperᵀ upper``, the damping and the number
    of attempts.

    Args:
        make: makes the matrix ``[d, d]`` float64, symmetric, with a positive diagonal. It is called for each attempt:
            this is cheap, and no more than two float64 matrices are in memory.
        damping: relative to the mean diagonal; raised tenfold after each failed attempt.

    Raises:
        InputError: the matrix is not positive definite with any of ``MAX_ATTEMPTS`` dampings, up to 10⁷ times the
            requested one. Rounding can cause this if there are fewer tokens than columns.
    """
    mean = math.nan

    def attempt(by: float) -> Tensor | None:
        nonlocal mean
        made = make()
        mean = float(made.diagonal().mean())
        made.diagonal().add_(by * mean)
        if not math.isfinite(mean) or not inverse_factor_(made):
            return None
        return made if torch.isfinite(made.sum()) else None

    return _damped_until(attempt, damping, lambda: mean)


def _damped_until(
    attempt: Callable[[float], Tensor | None], damping: float, mean: Callable[[], float]
) -> tuple[Tensor, float, int]:
    """What ``attempt(damping)`` returns for the first of the dampings that serves, this damping, and the number of
    attempts. ``mean``: the mean diagonal, for the message.

    Raises:
        InputError: as :func:`_inverse_factor`.
    """
    for number in range(1, MAX_ATTEMPTS + 1):
        found = attempt(damping)
        if found is not None:
            return found, damping, number
        last, damping = damping, max(10 * damping, LEAST_DAMPING)
    raise InputError(
        f"the Gram matrix of the inputs must become positive definite by damping (it is not with up to {last:g} of its "
        f"mean diagonal of {mean():g}); raise damping, or look for NaN or overflow in the activations"
    )
