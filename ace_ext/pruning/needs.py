"""Which kinds of statistics a configuration needs. This is the only place that decides it."""

from dataclasses import dataclass

from ace_ext.pruning.criteria import CustomMetric, metric_needs
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, WEIGHTED
from ace_ext.pruning.solver_config import SolverConfig

WEIGHTED_KIND = {GRAM: COSINE_GRAM, INPUT: WEIGHTED}
"""What the setting ``gram="cosine"`` puts in place of the kinds that solvers need."""


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
        solved = {kind for chosen in solver.matrix_solvers for kind in chosen.needs}
        if solver.gram == "cosine":
            solved = {WEIGHTED_KIND.get(kind, kind) for kind in solved}
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
