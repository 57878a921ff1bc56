"""Allocation: blocks may differ in sparsity, the model's total is that of the target
(:mod:`ace_ext.pruning.allocation`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Stage

OWL, ERROR = "owl", "error"


@dataclass(frozen=True)
class Allocate(Stage):
    """Divides the sparsity among blocks. The scores that it reads are those of the method's score stage, or Wanda's."""

    name = "allocate"
    summary = "gives blocks different sparsities with the same total; uniform without it"

    by: str = option(
        OWL,
        "owl: lower where scores have more outliers (arXiv 2310.05175); error: one more pruned weight costs the same "
        "error in every block",
        Limits(choices=(OWL, ERROR)),
    )
    range: float = option(
        0.05,
        "how far a block's sparsity may differ; three times as far by error",
        Limits(above=0, below=1, words="a difference in sparsity between 0 and 1"),
    )


STAGE = Allocate
