"""Which kinds of statistics a configuration needs. This is the only place that decides it."""

from dataclasses import dataclass

from ace_ext.pruning.criteria import CustomMetric, metric_needs
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, SKETCH, WEIGHTED
from ace_ext.pruning.solver_config import SolverConfig

EXCHANGED = {"plain": {}, "cosine": {GRAM: COSINE_GRAM, INPUT: WEIGHTED}, "sketch": {GRAM: SKETCH}}
"""What the setting ``gram`` puts in place of the kinds that solvers need."""


@dataclass(frozen=True)
class Needs:
    """The kinds of statistics (:mod:`ace_ext.pruning.kinds`) that a run needs, by their use."""

    prune: frozenset[str]
    """Read when a matrix is pruned."""
    measure: frozenset[str]
    """Read by the extra pass that allocates sparsity to blocks; empty if allocation is uniform."""

    @classmethod
    def of(cls, metric: str | CustomMetric, solver: SolverConfig, allocation: str) -> "Needs":
        """The kinds that these parts of a configuration read."""
        scored = metric_needs(metric)
        exchanged = EXCHANGED[solver.gram]
        solved = {exchanged.get(kind, kind) for chosen in solver.matrix_solvers for kind in chosen.needs}
        measure = {"uniform": frozenset(), "error": scored | {WEIGHTED}}.get(allocation, scored)
        return cls(scored | solved, measure)

    @property
    def read(self) -> frozenset[str]:
        """What a statistics file must hold for a run to prune from it."""
        return self.prune | self.measure

    @property
    def kept(self) -> frozenset[str]:
        """What a run writes to a statistics file.

        ``input`` and ``weighted`` are vectors that serve most metrics and cost little. The cross moment and the Gram
        matrices are as large as weights and are kept only if the run itself reads them.
        """
        return self.prune | {INPUT, WEIGHTED}
