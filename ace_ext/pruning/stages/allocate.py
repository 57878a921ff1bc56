"""Allocation: blocks may differ in sparsity, and the model's total is the target's
(:mod:`ace_ext.pruning.allocation`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Divide


@dataclass(frozen=True)
class Allocate(Divide):
    """Divides the sparsity among blocks. It reads the scores of the method's score stage, or Wanda's without one."""

    name = "allocate"
    summary = "gives blocks whose scores have more outliers a lower sparsity, with the same total (arXiv 2310.05175)"

    range: float = option(
        0.05,
        "how far a block's sparsity may differ from the target",
        Limits(above=0, below=1, words="a difference in sparsity between 0 and 1"),
    )


STAGE = Allocate
