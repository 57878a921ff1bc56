"""The approximation of a Gram matrix by a diagonal and a few directions, from one pass over the tokens.

With fixed random directions ``Ω [d, p]`` the state adds up ``Y = G Ω``, where ``G = Σ_t X_t X_tᵀ``. Nyström's
approximation ``Y (Ωᵀ Y)⁻¹ Yᵀ = Fᵀ F`` has G's leading directions, among them the mean of the inputs. It is stabilised
as in Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736, algorithm 3). The rest of the diagonal is added:
``G ≈ diag(g - Σ_k F_kj²) + Fᵀ F``. The matrix itself is never computed: all tensors are ``[d, p]``.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.pruning.damping import floor_energy, penalty
from ace_ext.pruning.gram import DEAD, AdmmFactor, scaled_rows
from ace_ext.pruning.scaling import InputScale, times_power, times_power_
from ace_ext.pruning.symmetric import LowRank

DIRECTIONS = 64
"""The maximum number of random directions of a sketch (:func:`direction_count`)."""
CPU_TOKENS = 256
"""Tokens whose products a CPU computes at a time: their float32 copies stay in the cache."""
LEAST_RESIDUAL = 1e-3
"""The least share of a column's square sum that stays in the diagonal. Without it, some changes would cost nothing."""
_SHIFT = 1e-6  # share of the product's norm: above its float32 rounding, far below the directions that are used


def direction_count(columns: int) -> int:
    """How many random directions a sketch has: ``DIRECTIONS``, or the number of columns if that is less."""
    return min(columns, DIRECTIONS)


class SketchState:
    """The sketch of the tokens seen so far: ``product [d, p]`` float32, ``squares [d]`` float64 (G's diagonal).

    Both are divided by ``4^scale.power``, as :class:`ace_ext.pruning.gram.GramState` does.

    It replaces a :class:`ace_ext.pruning.gram.GramState` in stages with the option ``gram=sketch``. Linears that share
    a state share its factors too.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.product = torch.zeros(columns, direction_count(columns), dtype=torch.float32, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.scale = InputScale()
        self.tokens = 0
        self._factors: tuple[Tensor, Tensor] | None = None
        self._admm: dict[tuple[float, float, float], AdmmFactor] = {}  # by damping, floor and relaxation

    def update(self, x: Tensor, token_scale: Tensor | None = None) -> None:
        """As :meth:`ace_ext.pruning.gram.GramState.update`."""
        random = _directions(x.shape[1], x.device)
        for part in scaled_rows(x, token_scale, at_once=None if x.is_cuda else CPU_TOKENS):
            self._lower_(self.scale.admit(part))
            rows = times_power(part, -self.scale.power)
            self.product.addmm_(rows.T, rows @ random)
            self.squares += rows.square().sum(0)
        self.tokens += len(x)
        self._forget_factors()

    def raise_scale_(self, exponent: int) -> None:
        """As :meth:`ace_ext.pruning.gram.GramState.raise_scale_`."""
        self._lower_(self.scale.raise_to(exponent))

    def _lower_(self, raised: int) -> None:
        """Divides the sums by ``4^raised`` after the scale was raised by ``raised``."""
        for part in self.sums():
            times_power_(part, -2 * raised)

    def merge_(self, other: "SketchState") -> None:
        """Adds the tokens of another state."""
        lower = 0
        if other.scale.exponent is not None:
            self.raise_scale_(other.scale.exponent)
            lower = 2 * (other.scale.power - self.scale.power)
        self.product += times_power(other.product.to(self.product.device), lower)
        self.squares += times_power(other.squares.to(self.squares.device), lower)
        self.tokens += other.tokens
        self._forget_factors()

    def sums(self) -> list[Tensor]:
        """The tensors to sum over data-parallel ranks."""
        return [self.product, self.squares]

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, for a statistics file."""
        sums = {"product": self.product, "squares": self.squares}
        return {**sums, "tokens": torch.tensor(self.tokens), **self.scale.tensors()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "SketchState":
        """The state of :meth:`tensors`. It uses the given tensors themselves, not copies."""
        state = cls(0, tensors["product"].device)
        state.product, state.squares, state.tokens = tensors["product"], tensors["squares"], int(tensors["tokens"])
        state.scale = InputScale.of_tensors(tensors)
        return state

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(d [d], F [p, d])`` float32 with ``G / 4^scale.power ≈ diag(d) + Fᵀ F``. Both have the same diagonal.
        Computed on first use.

        Raises:
            InputError: the sums are not finite.
        """
        if self._factors is None:
            self._factors = self._make_factors()
        return self._factors

    def _make_factors(self) -> tuple[Tensor, Tensor]:
        product, random = self.product.double(), _directions(len(self.product), self.product.device).double()
        shift = _SHIFT * product.norm()
        if not torch.isfinite(shift):
            raise InputError("the sketch of the inputs is not finite; look for NaN or overflow in the activations")
        if shift == 0:  # no token, or all inputs zero
            return self.squares.float(), torch.zeros_like(self.product.T)
        product = product + shift * random
        core = random.T @ product
        lower = torch.linalg.cholesky((core + core.T) / 2)
        found = torch.linalg.solve_triangular(lower, product.T, upper=False)
        # Subtract the shift again. The directions may not exceed a column's square sum.
        values, vectors = torch.linalg.eigh(found @ found.T)
        share = ((values - shift) / values.clamp_min(shift)).clamp_min(0.0).sqrt()
        found = (vectors * share).T @ found
        claimed = found.square().sum(0)
        most = (1 - LEAST_RESIDUAL) * self.squares
        found *= (most / claimed.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1.0).sqrt()
        return (self.squares - found.square().sum(0)).float(), found.float()

    def energy(self, rows: Tensor) -> Tensor:
        """As :meth:`ace_ext.pruning.gram.GramState.energy`."""
        diagonal, directions = self.factors()
        along = (rows @ directions.T).square_().sum(1)
        return (rows.square() @ diagonal).add_(along).sum(dtype=torch.float64)

    def admm_factor(
        self,
        damping: float,
        floor: float = 0.0,
        relaxation: float = 1.0,
        products: torch.dtype = torch.float32,
        diagonal: bool = True,
    ) -> AdmmFactor:
        """As :meth:`ace_ext.pruning.gram.GramState.admm_factor`. Products with few directions are cheap: they are in
        float32 whatever ``products`` says, and the diagonal is computed whatever ``diagonal`` says.

        Raises:
            InputError: as :meth:`factors`.
        """
        key = damping, floor, relaxation
        if key not in self._admm:
            self._admm[key] = self._make_admm_factor(*key)
        return self._admm[key]

    def _make_admm_factor(self, damping: float, floor: float, relaxation: float) -> AdmmFactor:
        diagonal, directions = (part.double() for part in self.factors())
        dead, least = self.squares == 0, floor_energy(self.squares, floor)
        norm = (self.squares + least).sqrt().masked_fill(dead, DEAD)
        directions = directions / norm
        damped = ((diagonal + least) / norm.square()).masked_fill(dead, 1.0) + damping
        inverse_diagonal = 1 / damped - _woodbury(damped, directions).square().sum(0)
        shifted, scale = damped + penalty(damping), relaxation * penalty(damping)
        inverse = _woodbury(shifted, directions)
        step = LowRank((scale / shifted + (1 - relaxation)).float(), (inverse * scale**0.5).float(), -1)
        return AdmmFactor(norm.float(), step, inverse_diagonal.float(), dead, damping, attempts=1)

    def _forget_factors(self) -> None:
        self._factors = None
        self._admm.clear()


def _woodbury(diagonal: Tensor, directions: Tensor) -> Tensor:
    """``B [p, d]`` with ``(diag + Fᵀ F)⁻¹ = diag⁻¹ - Bᵀ B``, for a positive ``diagonal [d]`` and ``F [p, d]``."""
    scaled = directions / diagonal
    core = scaled @ directions.T
    core.diagonal().add_(1.0)
    solved: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(core), scaled, upper=False)
    return solved


@lru_cache(maxsize=8)  # a model's Linears have few widths
def _directions(columns: int, device: torch.device) -> Tensor:
    """Ω ``[d, p]`` float32: orthonormal random columns. They depend on d alone, so all runs and ranks use the same."""
    random = torch.Generator().manual_seed(columns)
    normal = torch.randn(columns, direction_count(columns), generator=random, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(normal)[0].float().contiguous().to(device)
    return orthonormal
