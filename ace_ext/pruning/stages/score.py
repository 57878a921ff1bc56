"""Scores: each gives every weight a number. The target turns the numbers into a mask."""

from dataclasses import dataclass

from ace_ext.errors import InputError, suggestion
from ace_ext.pruning.metrics import METRICS, CustomMetric, metric_needs
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import Stage

EXPONENT = 0.5


@dataclass(frozen=True)
class Score(Stage):
    """Keeps the weights with the highest scores.

    Args:
        metric: a name of :data:`ace_ext.pruning.metrics.METRICS`, which is also the stage's name in a text; or a
            callable ``(weight, stats) -> score`` that returns a float tensor of the weight's shape, higher = keep.
            ``stats`` is a :class:`ace_ext.pruning.statistics.LinearStatistics`.
        exponent: the power of the input norm in ``ria``; no other metric reads it.
    """

    name = "score"
    summary = "keeps the weights with the highest scores"

    metric: str | CustomMetric = "wanda"
    exponent: float = option(EXPONENT, "the power of the input norm", Limits())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.metric) and not (isinstance(self.metric, str) and self.metric in METRICS):
            raise InputError(
                f"metric must be one of {', '.join(METRICS)}, or a callable (got {self.metric!r})"
                f"{suggestion(self.metric, METRICS)}"
            )
        if self.exponent != EXPONENT and self.metric != "ria":
            raise InputError(f"exponent is an option of ria alone (got {self.label}); leave it out")

    @property
    def label(self) -> str:
        """The metric's name; for a callable its ``__name__``."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "custom")

    @property
    def needs(self) -> frozenset[str]:
        """The kinds of statistics that the metric reads."""
        return metric_needs(self.metric)


STAGE = Score
