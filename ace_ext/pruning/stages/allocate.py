"""Allocation: blocks may differ in sparsity, and the model's total is the target's
(:mod:`ace_ext.pruning.allocation`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Stage

OWL, ERROR = "owl", "error"


@dataclass(frozen=True)
class Allocate(Stage):
    """Divides the sparsity among blocks. It reads the scores of the method's score stage, or Wanda's without one."""

    name = "allocate"
    summary = "gives blocks different sparsities with the same total (without it all are equal)"

    by: str = option(
        OWL,
        "owl: blocks whose scores have more outliers get a lower sparsity (arXiv 2310.05175); error: one more pruned "
        "weight costs the same error in every block",
        Limits(choices=(OWL, ERROR)),
    )
    range: float = option(
        0.05,
        "how far a block's sparsity may differ from the target; three times as far with by=error",
        Limits(above=0, below=1, words="a difference in sparsity between 0 and 1"),
    )


STAGE = Allocate
