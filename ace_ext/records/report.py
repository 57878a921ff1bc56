"""The report of a whole run."""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from ace_ext.dense_weights import DenseWeight, describe_dense, kind_of
from ace_ext.errors import counted, existing_folder
from ace_ext.records.agreement import Agreement
from ace_ext.records.healing import Healing, HeldOutPerplexity
from ace_ext.records.matrices import BlockReport, MatrixReport
from ace_ext.records.removed import Removed
from ace_ext.records.tables import RoundedTable

REPORT_NAME = "ace_report.json"
FORMAT = 1

LARGE_LOSS = 1.5
"""A report gives advice if pruned perplexity is at least this multiple of dense perplexity."""

_MUCH_TEXT = 65536
"""With at least this many calibration tokens, a report does not advise more."""


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
    """Matrices that stayed dense. Embeddings, the LM head, biases and norms are never pruned and are not listed."""
    healing: Healing | None = None
    """The distillation that followed, if there was one. The errors of matrices and blocks were measured before it."""
    perplexity: HeldOutPerplexity | None = None
    """Before and after, if the run measured it."""
    removed: list[Removed] = field(default_factory=list)
    """Structures that were removed first; ``to_json`` leaves an empty list out."""
    agreement: Agreement | None = None
    """With the dense model, if the run measured it: of a network that is no causal language model. ``to_json`` leaves
    None out."""
    embeddings: list[RoundedTable] = field(default_factory=list)
    """The token embedding and the LM head, if they were rounded; ``to_json`` leaves an empty list out."""
    whole_forwards: str | None = None
    """Why the statistics are of forwards of the whole model; those of each block were then read while it was dense
    (``order=block``). None, if the model was walked block by block; ``to_json`` leaves None out."""

    @property
    def matrices(self) -> list[MatrixReport]:
        """The matrices of all blocks, in order."""
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned matrices."""
        size = sum(matrix.size for matrix in self.matrices)
        return 1 - sum(matrix.nonzero for matrix in self.matrices) / size if size else 0.0

    @property
    def only_removed(self) -> bool:
        """Whether structures were removed and no weight was set to zero or rounded."""
        return bool(self.removed) and not self.blocks

    @property
    def quantized(self) -> bool:
        """Whether a stage rounded the weights to a grid."""
        return any(m.solution is not None and m.solution.loss_unquantized is not None for m in self.matrices)

    @property
    def method(self) -> str:
        """The requested method: ``"fast: admm(…)"`` for a preset, else the text of its stages. Empty if the
        configuration does not say."""
        method, preset = self.config.get("method"), self.config.get("preset")
        return f"{preset}: {method}" if preset and method else str(method or "")

    def advice(self) -> str:
        """One line that says what to try, if perplexity is :data:`LARGE_LOSS` times the dense model's or more; else
        empty."""
        if self.perplexity is None or self.perplexity.ratio is None or self.perplexity.ratio < LARGE_LOSS:
            return ""
        tries = [self._better_method(), self._better_text(), self._lower_target()]
        if self.only_removed:
            tries = [self._better_text(), "a lower share in --remove"]
        grown = f"{self.perplexity.ratio:.2g} times" if math.isfinite(self.perplexity.ratio) else "not finite, unlike"
        return f"large loss: perplexity is {grown} the dense model's; try {', '.join(filter(None, tries))}"

    def _better_method(self) -> str:
        method = str(self.config.get("method"))
        if self.healing is not None or "distill" in method:
            tokens = 4 * self.healing.tokens if self.healing is not None else 2**18
            return f'a longer distillation, e.g. --method "best(tokens={tokens})"'
        if "admm" not in method or "sketch" in method:
            return "--method balanced or best"
        return "--method better or best"

    def _better_text(self) -> str:
        calibration = self.extra.get("calibration") or {}
        if calibration.get("source") in ("self", "bundled"):
            return "--calibration with text like that of your task"
        tokens = calibration.get("nsamples", _MUCH_TEXT) * calibration.get("seqlen", 1)
        return f"more text, e.g. --nsamples {4 * calibration['nsamples']}" if tokens < _MUCH_TEXT else ""

    def _lower_target(self) -> str:
        pattern = self.config.get("pattern")
        return f"--sparsity without the pattern {pattern}" if pattern else "a lower --sparsity"

    def to_json(self) -> str:
        """The report as JSON, with the sparsity of each matrix and of the whole."""
        data = asdict(self)
        for name in ("removed", "embeddings"):
            if not data[name]:
                del data[name]
        if self.whole_forwards is None:
            del data["whole_forwards"]
        del data["agreement"]
        if self.agreement is not None:
            data["agreement"] = self.agreement.to_dict()
        for block, block_data in zip(self.blocks, data["blocks"], strict=True):
            for matrix, matrix_data in zip(block.matrices, block_data["matrices"], strict=True):
                matrix_data["sparsity"] = matrix.sparsity
        return json.dumps({"format": FORMAT, "sparsity": self.sparsity, **data}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PruneReport":
        """The reverse of :meth:`to_json`. Raises KeyError, TypeError or ValueError for JSON of another form."""
        data = json.loads(text)
        del data["format"], data["sparsity"]
        blocks = [BlockReport.from_dict(block) for block in data.pop("blocks")]
        healing = data.pop("healing", None)  # absent from old reports
        measured = data.pop("perplexity", None)
        dense = [DenseWeight.from_dict(weight) for weight in data.pop("dense", [])]  # absent too
        removed = [Removed.from_dict(record) for record in data.pop("removed", [])]
        agreement = data.pop("agreement", None)
        tables = [RoundedTable(**table) for table in data.pop("embeddings", [])]
        return cls(
            **data,
            blocks=blocks,
            dense=dense,
            removed=removed,
            embeddings=tables,
            healing=None if healing is None else Healing.from_dict(healing),
            perplexity=None if measured is None else HeldOutPerplexity(**measured),
            agreement=None if agreement is None else Agreement(**agreement),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the report into the folder of the model that it describes, for ``ace-prune verify``, ``heal`` and
        ``pack``.

        Raises:
            InputError: there is no such folder.
            OSError: it cannot be written.
        """
        (existing_folder(folder) / REPORT_NAME).write_text(self.to_json(), encoding="utf-8")

    def table(self) -> str:
        """A table as text: one line for each kind of matrix, averaged over blocks, and the totals below."""
        from tabulate import tabulate  # imported here: pruning itself does not need it

        lines = [record.summary() for record in self.removed]
        if self.only_removed:
            lines.append(f"{self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB on {self.device}")
            lines += [] if self.healing is None else [self.healing.summary()]
            lines += self.measured()
            return "\n".join([*lines, *filter(None, [self.advice()])])
        kinds: dict[str, list[MatrixReport]] = {}
        for block in self.blocks:
            for matrix in block.matrices:
                kinds.setdefault(kind_of(matrix.name.removeprefix(block.name + ".")), []).append(matrix)
        head = ["matrix", "shape", "sparsity", "rel. error", "cosine"]
        rows = [_figures_of(kind, matrices) for kind, matrices in kinds.items()]
        align = ["left", *["right"] * (len(head) - 1)]
        lines += [tabulate([head, *rows], tablefmt="plain", colalign=align, disable_numparse=True)]
        unseen = sum(not matrix.tokens for matrix in self.matrices)
        if unseen:
            lines.append(f"{unseen} experts' matrices saw no calibration token and were pruned by magnitude")
        lines += self._empty_rows()
        lines.append(
            f"{counted(len(self.blocks), 'block')}, {counted(len(self.matrices), 'matrix')}, "
            f"sparsity {self.sparsity:.4f}, {self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 2**30:.2f} GiB "
            f"on {self.device}"
        )
        if self.method:
            lines.append(f"method {self.method}")
        if self.whole_forwards is not None:
            lines.append(f"not walked block by block ({self.whole_forwards}): collect(order=block)")
        lines += self._rounded() or self._quantized()
        lines += [table.summary() for table in self.embeddings]
        lines += self._trained()
        lines += describe_dense(self.dense, sum(matrix.size for matrix in self.matrices))
        if self.healing is not None:
            lines.append(self.healing.summary())
        lines += self.measured()
        lines += filter(None, [self.advice()])
        return "\n".join(lines)

    def measured(self) -> list[str]:
        """A line about what was measured on held-out data, if anything was."""
        return [found.summary() for found in (self.perplexity, self.agreement) if found is not None]

    def _rounded(self) -> list[str]:
        """A line that explains why the sparsity differs from the requested one, if rounding is the reason."""
        wanted, group = self.config.get("sparsity"), str(self.config.get("group"))
        if self.config.get("pattern") or not isinstance(wanted, float) or group not in ("row", "matrix"):
            return []
        smallest = min((m.shape[1] if group == "row" else m.size for m in self.matrices), default=1)
        removed = 1 - sum(m.keep for m in self.matrices) / max(1, sum(m.size for m in self.matrices))
        if self.quantized or not 0.00005 <= abs(removed - wanted) <= 0.5 / smallest:
            return []
        return [f"sparsity is {removed:.4f}, not {wanted:g}: each {group} loses a whole number of weights"]

    def _quantized(self) -> list[str]:
        """A line about the stage ``quantize``, if there was one."""
        solutions = [m.solution for m in self.matrices if m.solution and m.solution.loss_unquantized is not None]
        if not solutions:
            return []
        before, after = (
            sum(figures) / len(solutions)
            for figures in ([s.loss_unquantized or 0.0 for s in solutions], [s.loss_after for s in solutions])
        )
        zeros = sum(matrix.keep - matrix.nonzero for matrix in self.matrices)
        return [
            f"quantized: mean squared error of a matrix's output {before:.5f} before, {after:.5f} after; {zeros:,} "
            "kept weights are 0"
        ]

    def _trained(self) -> list[str]:
        """A line about the stage ``train``, if there was one. Figures of matrices are those before it."""
        found = [block.tuning for block in self.blocks if block.tuning is not None]
        if not found:
            return []
        before = sum(tuning.loss_before for tuning in found) / len(found)
        after = sum(tuning.loss_after for tuning in found) / len(found)
        same = sum(not tuning.loss_after < tuning.loss_before for tuning in found)
        words = f"; {same} of {len(found)} blocks did not improve and stayed as they were" if same else ""
        return [f"trained: mean loss of a block {before:.4f} before, {after:.4f} after{words}"]

    def _empty_rows(self) -> list[str]:
        """A line about rows that have no weight left, if there are any."""
        found = [matrix for matrix in self.matrices if matrix.empty_rows]
        if not found:
            return []
        worst, rows = max(found, key=lambda matrix: matrix.empty_rows), sum(matrix.empty_rows for matrix in found)
        return [
            f"no weight is left in {counted(rows, 'row')} of {counted(len(found), 'matrix')}, "
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
