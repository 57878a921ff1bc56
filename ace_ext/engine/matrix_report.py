"""The report of one pruned matrix: the change of its output, measured on the sample rows of its statistics."""

import torch
from torch import Tensor
from torch.nn import functional

from ace_ext.models.products import float32_products
from ace_ext.pruning.masks import count_kept
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import MatrixReport


def output_of(stats: LinearStatistics, weight: Tensor) -> Tensor:
    """``[tokens, d_out]``: the outputs of the sample rows, without bias."""
    with float32_products(weight):  # as in the forward, whichever thread runs this
        return functional.linear(stats.sample_rows.to(weight.dtype), weight)  # another one under a model's autocast


class Measurements:
    """The reports of a block's matrices. Their figures stay on the device until :meth:`read_` fetches all of them at
    once: to wait for a GPU after each matrix would keep it from working ahead."""

    def __init__(self) -> None:
        self._pending: list[tuple[MatrixReport, Tensor, Tensor]] = []

    def measure(
        self, name: str, weight: Tensor, stats: LinearStatistics, dense: Tensor, keep: int | None
    ) -> MatrixReport:
        """The report of a pruned ``weight [rows, cols]``, whose figures :meth:`read_` will fill in.

        Args:
            name: the matrix's full name.
            weight: the pruned weight.
            stats: of the Linear's inputs, with sample rows.
            dense: what :func:`output_of` returned before pruning.
            keep: how many weights were to be kept; None: as many as are not zero.
        """
        before = dense.float()
        after = output_of(stats, weight).float()
        error = (after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny)
        cosine = functional.cosine_similarity(before, after, dim=1).mean()
        return self._note(name, weight, keep, stats.tokens, [error, cosine])

    def unseen(self, name: str, weight: Tensor, keep: int) -> MatrixReport:
        """The report of a pruned weight that saw no token."""
        return self._note(name, weight, keep, 0, [weight.new_zeros(()), weight.new_ones(())])

    def _note(self, name: str, weight: Tensor, keep: int | None, tokens: int, errors: list[Tensor]) -> MatrixReport:
        rows, cols = weight.shape
        report = MatrixReport(name, (rows, cols), -1 if keep is None else keep, -1, tokens, 0.0, 0.0)
        empty = rows - weight.any(dim=1).count_nonzero() if cols else weight.new_zeros(())
        figures = torch.stack([figure.double() for figure in (count_kept(weight), empty, *errors)])
        self._pending.append((report, weight, figures))
        return report

    def read_(self) -> None:
        """Fills in the figures of all reports. If fewer entries of a weight than ``keep`` are not zero, the mask kept
        zeros of the dense weight; some of these may be -0.0 and are set to +0.0."""
        if not self._pending:
            return
        device = self._pending[0][2].device  # with a device_map the others may be elsewhere
        found = torch.stack([figures.to(device) for _, _, figures in self._pending]).tolist()
        for (report, weight, _), (nonzero, empty, error, cosine) in zip(self._pending, found, strict=True):
            report.nonzero, report.empty_rows = int(nonzero), int(empty)
            report.relative_error, report.cosine = error, cosine
            if report.keep < 0:
                report.keep = report.nonzero
            if report.nonzero < report.keep:
                weight.masked_fill_(weight == 0, 0.0)
        self._pending.clear()
