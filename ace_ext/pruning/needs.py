"""Which kinds of statistics a method needs. This is the only place that decides it."""

from dataclasses import dataclass

from ace_ext.pruning.kinds import INPUT, WEIGHTED
from ace_ext.pruning.method import Method


@dataclass(frozen=True)
class Needs:
    """The kinds of statistics (:mod:`ace_ext.pruning.kinds`) that a run needs, by their use."""

    prune: frozenset[str]
    """Read to prune a matrix."""
    measure: frozenset[str]
    """Read by the extra pass that divides the sparsity among blocks; empty without this pass."""

    @classmethod
    def of(cls, method: Method) -> "Needs":
        """The kinds that the stages of a method read."""
        scored = method.scored_by.needs
        solved = {kind for stage in method.matrix_stages for kind in stage.needs}
        measure: frozenset[str] = frozenset()
        if method.allocate is not None:
            measure = scored
        return cls(scored | solved, measure)

    @property
    def read(self) -> frozenset[str]:
        """What a statistics file must hold so that a run can prune from it."""
        return self.prune | self.measure

    @property
    def kept(self) -> frozenset[str]:
        """What a run writes to a statistics file.

        ``input`` and ``weighted`` are vectors: most metrics read them, and they are small. The cross moment and the
        Gram matrices are as large as weights. They are written only if the run itself reads them.
        """
        return self.prune | {INPUT, WEIGHTED}
