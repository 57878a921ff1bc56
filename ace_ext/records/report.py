"""The report of a whole run."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ace_ext.dense_weights import DenseWeight, describe_dense, kind_of
from ace_ext.records.healing import Healing, HeldBackPerplexity
from ace_ext.records.matrices import BlockReport, MatrixReport

REPORT_NAME = "ace_report.json"
FORMAT = 1


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
