"""Which kinds of statistics a configuration needs: decided here and nowhere else."""

from dataclasses import dataclass

from ace_ext.pruning.criteria import CustomMetric, metric_needs
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, WEIGHTED
from ace_ext.pruning.solver_config import SolverConfig


@dataclass(frozen=True)
class Needs:
    """Kinds of :mod:`ace_ext.pruning.kinds`, by what reads them."""

    prune: frozenset[str]
    """Read when a matrix is pruned."""
    measure: frozenset[str]
    """Read by the walk that allocates sparsity to blocks; empty where it is uniform."""

    @classmethod
    def of(cls, metric: str | CustomMetric, solver: SolverConfig, allocation: str) -> "Needs":
        """Of a configuration's parts."""
        scored = metric_needs(metric)
        gram = {COSINE_GRAM if solver.gram == "cosine" else GRAM} if solver.matrix_solvers else set()
        measure = {"uniform": frozenset(), "error": scored | {WEIGHTED}}.get(allocation, scored)
        return cls(scored | gram, measure)

    @property
    def read(self) -> frozenset[str]:
        """What a statistics file must hold for a run to prune from it."""
        return self.prune | self.measure

    @property
    def kept(self) -> frozenset[str]:
        """What a run keeps in a statistics file: the two vectors serve most metrics and cost little; the cross moment
        and the Gram matrices are as large as weights, and kept only where the run itself reads them."""
        return self.prune | {INPUT, WEIGHTED}
