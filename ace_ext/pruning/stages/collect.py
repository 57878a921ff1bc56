"""Collecting the statistics, with which every method begins."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Stage

SEQUENTIAL, BLOCK = "sequential", "block"
EXACT, SKETCH = "exact", "sketch"


@dataclass(frozen=True)
class Collect(Stage):
    """How statistics are collected. A method without this stage collects with the defaults.

    With ``token_norm="sketch"`` the norms ``‖A_t‖`` come from a random projection of the dense output
    (:func:`ace_ext.pruning.statistics.sketched_output`). The sequential order then computes each Linear's output only
    once, with the pruned weight. The order ``block`` computes the dense output in any case.
    """

    name = "collect"
    summary = "collects the statistics of each Linear's inputs; write it only to change its options"

    order: str | None = option(
        None,
        "sequential: from inputs that have passed the pruned Linears before; block: from the dense block, as Wanda "
        "does (default: sequential; block with the group model and with saved statistics)",
        Limits(choices=(SEQUENTIAL, BLOCK)),
    )
    batch_tokens: int = option(
        16384, "calibration tokens that pass a block at a time; fewer need less memory", Limits(at_least=1)
    )
    token_norm: str | None = option(
        None,
        "how the output norms that weight tokens are computed (default: sketch with order=sequential, exact with "
        "order=block)",
        Limits(choices=(EXACT, SKETCH)),
    )


STAGE = Collect
