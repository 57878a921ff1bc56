"""Records of each pruned matrix and block."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Solution:
    """What the stages that follow the scores did to one matrix ``W``.

    Losses are ``Σ_i e_i G e_iᵀ / Σ_i w_i G w_iᵀ`` over the rows ``w_i`` of the dense matrix and their changes ``e_i``,
    with the stage's Gram matrix ``G`` ``[cols, cols]`` of all calibration tokens: the relative squared error of the
    outputs. For stages that read only moments, ``G`` is ``diag(σ²) + m mᵀ`` (:mod:`ace_ext.pruning.moment_gram`).
    """

    solver: str
    """The stage: ``"swaps"``, ``"obs"``, ``"admm"`` …, or two of them in order, as in ``"swaps+admm"``."""
    damping: float
    """Damping of the factorisation that succeeded, relative to the mean diagonal of ``G``; 0 if there was none."""
    attempts: int
    """Factorisations tried, each with ten times the damping of the one before; 0 if none was needed."""
    loss_before: float | None
    """With the mask of the scores and unchanged remaining weights; None if no scores choose a mask, or nothing is
    pruned."""
    loss_after: float
    """With the mask and weights after the last stage."""
    loss_unquantized: float | None = None
    """Before the stage ``quantize``; None without that stage."""


@dataclass
class MatrixReport:
    """One pruned matrix. Its errors compare the outputs ``A`` of the dense and ``A'`` of the pruned weight on up to 128
    calibration tokens. ``relative_error`` is ``‖A' - A‖ / ‖A‖`` over all these tokens. ``cosine`` is the mean over
    tokens ``t`` of ``cos(A_t, A'_t)``.
    """

    name: str
    shape: tuple[int, int]
    keep: int
    """Number of weights that the mask keeps."""
    nonzero: int
    """Number of weights that are not zero: less than ``keep`` only if the dense weight had zeros, or if a stage rounded
    kept weights to zero."""
    tokens: int
    """Calibration tokens that reached it. 0: the router sent this expert none. The expert is then pruned by magnitude,
    and its errors mean nothing."""
    relative_error: float
    cosine: float
    solution: Solution | None = None
    """None if no refine or solve stage was applied."""
    empty_rows: int = 0
    """Rows without a remaining weight: these outputs are constant."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzero / self.size if self.size else 0.0


@dataclass
class Tuning:
    """The training of one block. Its loss is the mean over the tokens that were held out of ``‖output - target‖² /
    ‖target - input‖²``, each channel weighted (:func:`ace_ext.pruning.block_training.channel_weights`). The target is
    the dense block's output. Both losses are equal if training did not lower the loss and was undone."""

    loss_before: float
    loss_after: float
    epoch: int | None = None
    """After which the weights of the result were measured; 0: before the first. None in reports of earlier releases."""


@dataclass
class BlockReport:
    """One block: the time it took, its matrices, and its training if there was one."""

    name: str
    seconds: float
    matrices: list[MatrixReport] = field(default_factory=list)
    tuning: Tuning | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BlockReport":
        """The reverse of ``dataclasses.asdict``, also after JSON."""
        tuning = data.get("tuning")
        _check_kinds(data, name=str, seconds=float)
        return cls(
            data["name"],
            data["seconds"],
            [_matrix_from_dict(matrix) for matrix in data["matrices"]],
            None if tuning is None else Tuning(**tuning),
        )


def _matrix_from_dict(data: Mapping[str, Any]) -> MatrixReport:
    fields = {key: value for key, value in data.items() if key != "sparsity"}
    rows, cols = fields["shape"]
    fields["shape"] = (rows, cols)
    _check_kinds(fields, name=str, keep=int, nonzero=int, tokens=int, relative_error=float, cosine=float)
    _check_kinds({"rows": rows, "columns": cols}, rows=int, columns=int)
    if fields.get("solution") is not None:  # absent from old reports
        fields["solution"] = Solution(**fields["solution"])
    return MatrixReport(**fields)


def _check_kinds(data: Mapping[str, Any], **kinds: type) -> None:
    """Raises TypeError for a value read from JSON that is not of its kind; a whole number is a float too."""
    for name, kind in kinds.items():
        if type(data[name]) is not kind and not (kind is float and type(data[name]) is int):
            raise TypeError(f"{name} must be {kind.__name__} (got {data[name]!r})")
