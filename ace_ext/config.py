"""What to prune and how: checked when it is made, so that nothing is touched for a bad argument."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError
from .scores import METRICS

GROUPS = ("row", "matrix", "model")
ORDERS = ("block", "sequential")
MAX_GROUP_M = 32


def keep_count(size: int, sparsity: float) -> int:
    """How many of ``size`` weights survive: ``size - floor(size * sparsity + 1/2)``. The only place that rounds."""
    return size - math.floor(size * sparsity + 0.5)


@dataclass(frozen=True)
class SparsityPattern:
    """N:M sparsity: ``keep_n`` of each ``group_m`` consecutive inputs of a row are kept (elsewhere often: pruned).

    Raises:
        InputError: unless ``0 < keep_n < group_m <= 32``.
    """

    keep_n: int
    group_m: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_n < self.group_m <= MAX_GROUP_M:
            raise InputError(
                f"pattern must be N:M with 0 < N < M <= {MAX_GROUP_M}, N weights kept of M (got {self}); e.g. 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> "SparsityPattern":
        """From text like ``"2:4"``."""
        parts = text.split(":")
        if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
            raise InputError(f"pattern must be N:M, N weights kept of M (got {text!r}); e.g. 2:4")
        return cls(int(parts[0]), int(parts[1]))

    @property
    def sparsity(self) -> float:
        return 1 - self.keep_n / self.group_m

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}"


@dataclass(frozen=True)
class PruneConfig:
    """How :func:`ace_ext.prune_model` scores, compares and walks.

    Args:
        metric: a name of :data:`ace_ext.scores.METRICS`, or a callable ``(weight, stats) -> score`` that returns a
            float tensor of the weight's shape, higher = keep; ``stats`` is a
            :class:`ace_ext.statistics.LinearStatistics`.
        sparsity: share of zeros in ``[0, 1]``; default 0.5. Not together with ``pattern``.
        pattern: N:M, as a :class:`SparsityPattern` or text like ``"2:4"``; N are kept.
        group: which weights compete for survival: those of one ``"row"``, ``"matrix"``, or the whole ``"model"``.
        order: ``"sequential"`` (default): each Linear's statistics come from inputs that already passed the pruned
            ones before it; ``"block"``: all statistics of a block come from the dense block, as in Wanda. The group
            ``"model"`` needs every score at once, so there it is ``"block"``, with dense blocks all the way.
        skip: regular expressions; a Linear or expert weight whose full name matches one is left alone.
        ria_exponent: the power of the input norm in the metric ``ria``.
        batch_tokens: how many calibration tokens go through a block at a time. All at once is fastest where they fit:
            the sequential order then needs one forward a block instead of one for each stage.

    Raises:
        InputError: for any value outside these.
    """

    metric: str | Callable = "ace"
    sparsity: float | None = None
    pattern: SparsityPattern | str | None = None
    group: str = "row"
    order: str | None = None
    skip: tuple[str, ...] = ()
    ria_exponent: float = 0.5
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", SparsityPattern.parse(self.pattern))
        self._check_metric()
        if self.group not in GROUPS:
            raise InputError(f"group must be one of {', '.join(GROUPS)} (got {self.group!r})")
        self._fill_sparsity()
        self._fill_order()
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1 (got {self.batch_tokens})")

    def _check_metric(self) -> None:
        if not callable(self.metric) and self.metric not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, or a callable (got {self.metric!r})")

    def _fill_sparsity(self) -> None:
        if self.pattern is not None:
            if self.sparsity is not None and self.sparsity != self.pattern.sparsity:
                raise InputError(f"give sparsity or pattern, not both (got {self.sparsity} and {self.pattern})")
            if self.group != "row":
                raise InputError(f"a pattern compares within its own groups: group must be row (got {self.group!r})")
            object.__setattr__(self, "sparsity", self.pattern.sparsity)
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5)
        if not 0 <= self.sparsity <= 1:
            raise InputError(f"sparsity must be a share of zeros from 0 to 1 (got {self.sparsity})")

    def _fill_order(self) -> None:
        default = "block" if self.group == "model" else "sequential"
        order = default if self.order is None else self.order
        if order not in ORDERS:
            raise InputError(f"order must be one of {', '.join(ORDERS)} (got {order!r})")
        if self.group == "model" and order != "block":
            raise InputError("group model compares all scores at once, so order must be block (got 'sequential')")
        object.__setattr__(self, "order", order)

    @property
    def metric_name(self) -> str:
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "custom")

    def to_dict(self) -> dict:
        """Plain values for a report."""
        return {
            "metric": self.metric_name,
            "sparsity": self.sparsity,
            "pattern": str(self.pattern) if self.pattern else None,
            "group": self.group,
            "order": self.order,
            "skip": list(self.skip),
            "ria_exponent": self.ria_exponent,
            "batch_tokens": self.batch_tokens,
        }
