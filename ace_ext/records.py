"""What a pruning run did, as data: written beside the model as JSON, and shown as a short table."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ace_ext.dense_weights import DenseWeight, describe_dense, kind_of

REPORT_NAME = "ace_report.json"
FORMAT = 1


@dataclass
class Solution:
    """What a solver did to one matrix ``W``.

    Losses are ``Σ_i e_i G e_iᵀ / Σ_i w_i G w_iᵀ`` over the rows ``w_i`` of the dense matrix and their changes ``e_i``,
    with the solver's Gram matrix ``G`` ``[cols, cols]`` of all calibration tokens: the relative squared error of the
    outputs. For solvers that read only moments ``G`` is ``diag(σ²) + m mᵀ`` (:mod:`ace_ext.pruning.moment_gram`).
    """

    solver: str
    """``"swaps"``, ``"obs"``, ``"admm"``, or two of them in order, as in ``"swaps+admm"``."""
    damping: float
    """With which the factorisation succeeded, relative to the mean diagonal of ``G``; 0 if nothing was factorised."""
    attempts: int
    """Factorisations tried, each with ten times the damping of the one before; 0 if none was needed."""
    loss_before: float
    """With the metric's mask and unchanged remaining weights."""
    loss_after: float
    """With the solver's mask and weights."""


@dataclass
class MatrixReport:
    """One pruned matrix. Its errors compare the outputs ``A`` of the dense and ``A'`` of the pruned weight on up to 128
    calibration tokens: ``relative_error`` is ``‖A' - A‖ / ‖A‖`` over all these tokens, ``cosine`` the mean over tokens
    ``t`` of ``cos(A_t, A'_t)``.
    """

    name: str
    shape: tuple[int, int]
    keep: int
    """Number of weights that the mask keeps."""
    nonzero: int
    """Number of weights that are not zero: less than ``keep`` only if the dense weight had zeros."""
    tokens: int
    """Calibration tokens that it saw. 0 for an expert that the router sent none: it is pruned by magnitude, and its
    errors mean nothing."""
    relative_error: float
    cosine: float
    solution: Solution | None = None
    """None if there was no solver."""
    empty_rows: int = 0
    """Rows that have no weight left: these outputs are constant."""

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
    """The training of one block. Its loss is the mean over tokens of ``‖output - target‖² / ‖target - input‖²``, where
    the target is the dense block's output. Both are equal if training did not lower the loss and was undone."""

    loss_before: float
    loss_after: float


@dataclass
class BlockReport:
    """One block: the time it took, its matrices, and its training if there was one."""

    name: str
    seconds: float
    matrices: list[MatrixReport] = field(default_factory=list)
    tuning: Tuning | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BlockReport":
        """The reverse of ``dataclasses.asdict``, also of one that was written as JSON."""
        tuning = data.get("tuning")
        _check_kinds(data, name=str, seconds=float)
        return cls(
            data["name"],
            data["seconds"],
            [_matrix_from_dict(matrix) for matrix in data["matrices"]],
            None if tuning is None else Tuning(**tuning),
        )


@dataclass
class Healing:
    """A distillation of the pruned model from the dense one. Losses are means over tokens of ``KL(dense ‖ pruned)``,
    the Kullback-Leibler divergence of the distributions of the next token, in nats."""

    settings: dict[str, Any]
    """The fields of :class:`ace_ext.healing.HealSettings`."""
    tokens: int
    """Tokens trained on, those of every pass counted."""
    steps: int
    parts: int
    """Into how many windows the blocks were divided that were trained one after the other; 1: all together."""
    held_back: int
    """Tokens that were only measured on."""
    loss_before: float
    """On the held-back tokens."""
    loss_after: float
    """Of the weights that were kept: the best that were measured, so never more than ``loss_before``."""
    zeros: int
    """Pruned weights, which were checked to be zero before and after."""
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    """The loss over time: the number of a step, and the mean of the losses since the entry before, each on the tokens
    of its step."""
    checks: list[tuple[int, float]] = field(default_factory=list)
    """The loss on the held-back tokens after a number of steps."""

    def summary(self) -> str:
        """One line."""
        rate = self.settings.get("learning_rate")
        end = "" if self.loss_after < self.loss_before else f": no gain, try a learning rate below {rate}"
        return (
            f"distilled on {self.tokens:,} tokens in {self.steps} steps, {self.seconds:.1f} s: KL on "
            f"{self.held_back:,} held-back tokens {self.loss_before:.4f} before, {self.loss_after:.4f} after{end}"
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Healing":
        """The reverse of ``dataclasses.asdict``, also of one that was written as JSON."""
        pairs = {name: [(int(step), float(loss)) for step, loss in data[name]] for name in ("losses", "checks")}
        return cls(**{**data, **pairs})


@dataclass
class HeldBackPerplexity:
    """Perplexity on a few windows of text that was no calibration: no result to quote. None: not finite."""

    text: str
    windows: int
    seqlen: int
    """Tokens of a window; the first is not predicted."""
    dense: float | None
    pruned: float | None
    healed: float | None = None
    """After a distillation that belongs to the run; None also if there was none."""

    def summary(self) -> str:
        """One line."""
        figures = [f"{figure_text(self.dense)} dense", f"{figure_text(self.pruned)} pruned"]
        if self.healed is not None:
            figures.append(f"{figure_text(self.healed)} distilled")
        place = f"{self.windows} windows of {self.seqlen} tokens of {self.text}"
        return f"perplexity {', '.join(figures)} ({place})"


def figure_text(value: float | None) -> str:
    """A perplexity for people."""
    return "not finite" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@dataclass
class PruneReport:
    """The whole run. ``extra`` is for the caller (model, calibration data …)."""

    config: dict[str, Any]
    device: str
    dtype: str
    blocks: list[BlockReport] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    dense: list[DenseWeight] = field(default_factory=list)
    """Matrices that stayed dense. Embeddings, the LM head, biases and norms always do and are not listed."""
    healing: Healing | None = None
    """The distillation that followed, if there was one. The errors of matrices and blocks are those before it."""
    perplexity: HeldBackPerplexity | None = None
    """Before and after, if the run measured it."""

    @property
    def matrices(self) -> list[MatrixReport]:
        """The matrices of all blocks, in order."""
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        size = sum(matrix.size for matrix in self.matrices)
        return 1 - sum(matrix.nonzero for matrix in self.matrices) / size if size else 0.0

    def to_json(self) -> str:
        """The report as JSON, with the sparsity of each matrix and of the whole."""
        data = asdict(self)
        for block, block_data in zip(self.blocks, data["blocks"], strict=True):
            for matrix, matrix_data in zip(block.matrices, block_data["matrices"], strict=True):
                matrix_data["sparsity"] = matrix.sparsity
        return json.dumps({"format": FORMAT, "sparsity": self.sparsity, **data}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruneReport":
        """The reverse of :meth:`to_json`. Raises KeyError or TypeError for JSON of another form."""
        data = json.loads(text)
        del data["format"], data["sparsity"]
        blocks = [BlockReport.from_dict(block) for block in data.pop("blocks")]
        healing = data.pop("healing", None)  # absent from reports written before there was any
        measured = data.pop("perplexity", None)
        dense = [DenseWeight.from_dict(weight) for weight in data.pop("dense", [])]  # absent too
        return cls(
            **data,
            blocks=blocks,
            dense=dense,
            healing=None if healing is None else Healing.from_dict(healing),
            perplexity=None if measured is None else HeldBackPerplexity(**measured),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into the folder of the model that it describes, for ``ace-prune verify``, ``heal`` and
        ``pack``.

        Raises:
            OSError: the folder is not there, or cannot be written.
        """
        (Path(folder) / REPORT_NAME).write_text(self.to_json(), encoding="utf-8")

    def table(self) -> str:
        """A table as text: one line for each kind of matrix, averaged over blocks, and the totals below."""
        from tabulate import tabulate  # imported here: pruning itself does without it

        kinds: dict[str, list[MatrixReport]] = {}
        for block in self.blocks:
            for matrix in block.matrices:
                kinds.setdefault(kind_of(matrix.name.removeprefix(block.name + ".")), []).append(matrix)
        head = ["matrix", "shape", "sparsity", "rel. error", "cosine"]
        rows = [_figures_of(kind, matrices) for kind, matrices in kinds.items()]
        align = ["left", *["right"] * (len(head) - 1)]
        lines = [tabulate([head, *rows], tablefmt="plain", colalign=align, disable_numparse=True)]
        unseen = sum(not matrix.tokens for matrix in self.matrices)
        if unseen:
            lines.append(f"{unseen} experts' matrices saw no calibration token and were pruned by magnitude")
        lines += self._empty_rows()
        lines.append(
            f"{len(self.blocks)} blocks, {len(self.matrices)} matrices, sparsity {self.sparsity:.4f}, "
            f"{self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB on {self.device}"
        )
        lines += describe_dense(self.dense, sum(matrix.size for matrix in self.matrices))
        if self.healing is not None:
            lines.append(self.healing.summary())
        if self.perplexity is not None:
            lines.append(self.perplexity.summary())
        return "\n".join(lines)

    def _empty_rows(self) -> list[str]:
        """A line about rows that have no weight left, if there are any."""
        found = [matrix for matrix in self.matrices if matrix.empty_rows]
        if not found:
            return []
        worst = max(found, key=lambda matrix: matrix.empty_rows)
        return [
            f"no weight is left in {sum(matrix.empty_rows for matrix in found):,} rows of {len(found)} matrices, "
            f"{worst.empty_rows:,} of {worst.shape[0]:,} in {worst.name}: these outputs are constant now"
        ]


def _figures_of(kind: str, matrices: list[MatrixReport]) -> list[str]:
    """A line of the table: the shape of the first of the matrices, and means over all."""
    count = len(matrices)
    size = sum(m.size for m in matrices)
    sparsity = 1 - sum(m.nonzero for m in matrices) / size if size else 0.0
    error = sum(m.relative_error for m in matrices) / count
    cosine = sum(m.cosine for m in matrices) / count
    return [kind, "x".join(map(str, matrices[0].shape)), f"{sparsity:.4f}", f"{error:.4f}", f"{cosine:.4f}"]


def _matrix_from_dict(data: Mapping[str, Any]) -> MatrixReport:
    fields = {key: value for key, value in data.items() if key != "sparsity"}
    rows, cols = fields["shape"]
    fields["shape"] = (rows, cols)
    _check_kinds(fields, name=str, keep=int, nonzero=int, tokens=int, relative_error=float, cosine=float)
    _check_kinds({"rows": rows, "columns": cols}, rows=int, columns=int)
    if fields.get("solution") is not None:  # absent from reports written before there were solvers
        fields["solution"] = Solution(**fields["solution"])
    return MatrixReport(**fields)


def _check_kinds(data: Mapping[str, Any], **kinds: type) -> None:
    """Raises TypeError for a value read from JSON that is not of its kind; a whole number is a float too."""
    for name, kind in kinds.items():
        if type(data[name]) is not kind and not (kind is float and type(data[name]) is int):
            raise TypeError(f"{name} must be {kind.__name__} (got {data[name]!r})")
