"""What a pruning run did, as data: kept beside the model as JSON, shown as a short table."""

import json
from dataclasses import asdict, dataclass, field

REPORT_NAME = "ace_report.json"
FORMAT = 1


@dataclass
class Solution:
    """What a solver did to one matrix. Losses are ``Σ_i e_i G e_iᵀ / Σ_i w_i G w_iᵀ``: the squared error of the outputs
    against the dense ones, relative, on all calibration tokens as the solver's Gram matrix ``G`` weights them."""

    solver: str
    """``"swaps"``, ``"obs"``, ``"admm"``, or two of them in order, as in ``"swaps+admm"``."""
    damping: float
    """What the factorisation succeeded with, relative to the mean diagonal; 0 where nothing was factorised."""
    attempts: int
    """Factorisations tried, each with ten times the damping of the one before; 0 where none was needed."""
    loss_before: float
    """With the metric's mask and the weights untouched."""
    loss_after: float


@dataclass
class MatrixReport:
    """One pruned matrix. Errors are those of its output on up to 128 calibration tokens, dense against pruned weight.

    ``relative_error`` is ``‖A' - A‖ / ‖A‖`` over all these tokens; ``cosine`` the mean over tokens of
    ``cos(A_t, A'_t)``.
    """

    name: str
    shape: tuple[int, int]
    keep: int
    """How many weights the mask keeps."""
    nonzero: int
    """How many of them are not zero: fewer than ``keep`` only where the dense weight held zeros."""
    tokens: int
    """That it saw in calibration. 0 for an expert that none was sent to: its mask is by magnitude then, and its errors
    say nothing."""
    relative_error: float
    cosine: float
    solution: Solution | None = None
    """None where the metric alone decided."""

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return 1 - self.nonzero / self.size if self.size else 0.0


@dataclass
class Tuning:
    """The training of one block: the mean over tokens of ``‖output - target‖² / ‖target - input‖²``, the target being
    the dense block's output. Equal where training did not lower it and was undone."""

    loss_before: float
    loss_after: float


@dataclass
class BlockReport:
    name: str
    seconds: float
    matrices: list[MatrixReport] = field(default_factory=list)
    tuning: Tuning | None = None

    @classmethod
    def from_dict(cls, data: dict) -> "BlockReport":
        """From what ``dataclasses.asdict`` and JSON made of one."""
        tuning = data.get("tuning")
        return cls(
            data["name"],
            data["seconds"],
            [_matrix_from_dict(matrix) for matrix in data["matrices"]],
            None if tuning is None else Tuning(**tuning),
        )


@dataclass
class PruneReport:
    """The whole run. ``extra`` is for the caller (model, calibration data …)."""

    config: dict
    device: str
    dtype: str
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    versions: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)

    @property
    def matrices(self) -> list[MatrixReport]:
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        size = sum(matrix.size for matrix in self.matrices)
        return 1 - sum(matrix.nonzero for matrix in self.matrices) / size if size else 0.0

    def to_json(self) -> str:
        data = asdict(self)
        for block, block_data in zip(self.blocks, data["blocks"], strict=True):
            for matrix, matrix_data in zip(block.matrices, block_data["matrices"], strict=True):
                matrix_data["sparsity"] = matrix.sparsity
        return json.dumps({"format": FORMAT, "sparsity": self.sparsity, **data}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruneReport":
        data = json.loads(text)
        data.pop("format"), data.pop("sparsity")
        blocks = [BlockReport.from_dict(block) for block in data.pop("blocks")]
        return cls(**data, blocks=blocks)

    def table(self) -> str:
        """A short table for people: one line for each kind of matrix, averaged over blocks, and the totals."""
        kinds: dict[str, list[MatrixReport]] = {}
        for block in self.blocks:
            for matrix in block.matrices:
                kinds.setdefault(kind_of(matrix.name.removeprefix(block.name + ".")), []).append(matrix)
        width = max([len("matrix"), *map(len, kinds)])
        lines = [f"{'matrix':<{width}}  {'shape':>14}  {'sparsity':>8}  {'rel. error':>10}  {'cosine':>7}"]
        for kind, matrices in kinds.items():
            count = len(matrices)
            size = sum(m.size for m in matrices)
            sparsity = 1 - sum(m.nonzero for m in matrices) / size if size else 0.0
            error = sum(m.relative_error for m in matrices) / count
            cosine = sum(m.cosine for m in matrices) / count
            shape = "x".join(map(str, matrices[0].shape))
            lines.append(f"{kind:<{width}}  {shape:>14}  {sparsity:>8.4f}  {error:>10.4f}  {cosine:>7.4f}")
        unseen = sum(not matrix.tokens for matrix in self.matrices)
        if unseen:
            lines.append(f"{unseen} experts' matrices saw no calibration token and were pruned by magnitude")
        lines.append(
            f"{len(self.blocks)} blocks, {len(self.matrices)} matrices, sparsity {self.sparsity:.4f}, "
            f"{self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB on {self.device}"
        )
        return "\n".join(lines)


def kind_of(name: str) -> str:
    """A matrix's name with a star for its numbers, of blocks and of experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _matrix_from_dict(data: dict) -> MatrixReport:
    fields = {key: value for key, value in data.items() if key != "sparsity"}
    fields["shape"] = tuple(fields["shape"])
    if fields.get("solution") is not None:  # absent from reports written before there were solvers
        fields["solution"] = Solution(**fields["solution"])
    return MatrixReport(**fields)
