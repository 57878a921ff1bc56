"""The report of one pruned matrix: the change of its output, measured on the sample rows of its statistics."""

import torch
from torch import Tensor
from torch.nn import functional

from ace_ext.pruning.masks import count_kept
from ace_ext.pruning.statistics import LinearStatistics
from ace_ext.records import MatrixReport


def dense_output(stats: LinearStatistics, weight: Tensor) -> Tensor:
    """``[tokens, d_out]``: the dense outputs of the sample rows, without bias."""
    return functional.linear(stats.sample_rows, weight)


def measure(name: str, weight: Tensor, stats: LinearStatistics, dense: Tensor, keep: int) -> MatrixReport:
    """The report of a pruned ``weight [rows, cols]``.

    Args:
        name: the matrix's full name.
        weight: the pruned weight.
        stats: of the Linear's inputs, with sample rows.
        dense: what :func:`dense_output` returned before pruning.
        keep: how many weights were to be kept.
    """
    nonzero = count_nonzero_(weight, keep)
    before = dense.float()
    after = functional.linear(stats.sample_rows, weight).float()
    error = float((after - before).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
    cosine = float(functional.cosine_similarity(before, after, dim=1).mean())
    rows, cols = weight.shape
    return MatrixReport(name, (rows, cols), keep, nonzero, stats.tokens, error, cosine)


def count_nonzero_(weight: Tensor, keep: int) -> int:
    """How many entries are not zero. If there are fewer than ``keep``, the mask kept zeros of the dense weight; some of
    these may be -0.0 and are set to +0.0."""
    nonzero = count_kept(weight)
    if nonzero < keep:
        weight.masked_fill_(weight == 0, 0.0)
    return nonzero
