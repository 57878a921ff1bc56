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


def relative_error(before: Tensor, after: Tensor) -> Tensor:
    """``‖after - before‖ / ‖before‖`` of ``[tokens, d_out]`` float32: ``[]`` float32, 0 if both are zero.

    Both are divided by the power of two of the largest output, so that no square overflows or vanishes. This does not
    wait for a GPU.
    """
    largest = before.abs().amax() if before.numel() else before.new_zeros(())
    before, after = _divided(before, largest), _divided(after, largest)
    error: Tensor = (after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return error


def mean_cosine(before: Tensor, after: Tensor) -> Tensor:
    """The mean over tokens of the cosine between rows of ``[tokens, d_out]`` float32: ``[]`` float32, 1 for a token
    whose output is zero in both."""
    largest = _largest(before), _largest(after)
    unchanged = ((largest[0] == 0) & (largest[1] == 0)).squeeze(1)
    before, after = (_divided(rows, most) for rows, most in zip((before, after), largest, strict=True))
    return functional.cosine_similarity(before, after, dim=1).masked_fill(unchanged, 1.0).mean()


def _largest(rows: Tensor) -> Tensor:
    """``[tokens, 1]``: the largest magnitude of each row."""
    return rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)


def _divided(rows: Tensor, largest: Tensor) -> Tensor:
    """``rows`` divided by the power of two of ``largest``, in two steps: the power may be out of float32's range."""
    exponent = torch.frexp(largest)[1]
    half = exponent // 2
    for part in (half, exponent - half):
        rows = rows * torch.ldexp(torch.ones_like(largest), -part)  # ldexp of all rows computes each power again
    return rows


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
        before, after = dense.float(), output_of(stats, weight).float()
        error, cosine = relative_error(before, after), mean_cosine(before, after)
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
