"""Collecting the statistics, with which every method begins."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Stage

SEQUENTIAL, BLOCK = "sequential", "block"
EXACT, SKETCH = "exact", "sketch"


@dataclass(frozen=True)
class Collect(Stage):
    """How statistics are collected. A method that does not write it collects with the defaults.

    With ``token_norm="sketch"`` the norms ``‖A_t‖`` come from a random projection of the dense output
    (:func:`ace_ext.pruning.statistics.sketched_output`), so the sequential order computes each Linear's output only
    once, with the pruned weight. The order ``block`` computes the dense output anyway.
    """

    name = "collect"
    summary = "collects the statistics of each Linear's inputs; written only to change its options"

    order: str | None = option(
        None,
        "sequential: from inputs that already passed the pruned Linears before; block: from the dense block, as Wanda "
        "does (default: sequential; block with the group model and with saved statistics)",
        Limits(choices=(SEQUENTIAL, BLOCK)),
    )
    batch_tokens: int = option(16384, "calibration tokens that go through a block at a time", Limits(at_least=1))
    token_norm: str | None = option(
        None,
        "how the output norms that weight tokens are computed (default: sketch if sequential, exact if block)",
        Limits(choices=(EXACT, SKETCH)),
    )


STAGE = Collect
