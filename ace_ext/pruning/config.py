"""What to prune and how: checked when it is made, so that nothing is touched for a bad argument."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ace_ext.errors import InputError
from ace_ext.pruning.criteria import METRICS, metric_needs
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM

GROUPS = ("row", "matrix", "model")
ORDERS = ("block", "sequential")
TOKEN_NORMS = ("exact", "sketch")
REFINES = ("swaps",)
UPDATES = ("obs", "admm")
GRAMS = ("plain", "cosine")
SALIENCIES = ("magnitude", "obs")
ALLOCATIONS = ("uniform", "owl", "error")
DAMPING = {"obs": 0.01, "admm": 0.1}
"""Each update's own default: SparseGPT's (arXiv 2301.00774) and ADMM pruning's (arXiv 2401.02938)."""
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
        metric: a name of :data:`ace_ext.pruning.criteria.METRICS`, or a callable ``(weight, stats) -> score`` that
            returns a float tensor of the weight's shape, higher = keep; ``stats`` is a
            :class:`ace_ext.pruning.statistics.LinearStatistics`.
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
        token_norm: where the ``‖A_t‖`` come from that weigh tokens: ``"exact"``, from the dense output itself, or
            ``"sketch"``, from a random projection of it
            (:func:`ace_ext.pruning.statistics.sketched_output`). With a sketch the sequential order computes each
            Linear's output once, with the pruned weight; so that is its default. In the order ``"block"`` the dense
            output is there anyway, and ``"exact"`` the default.
        refine: ``"swaps"`` exchanges kept and pruned weights of a row while the error of its output falls, starting
            from the metric's mask (arXiv 2512.10922). An ``update`` then keeps this mask.
        update: how the weights that stay make up for the others: ``"obs"``, column by column (SparseGPT, arXiv
            2301.00774), or ``"admm"`` (arXiv 2401.02938). Without ``refine`` it chooses the mask too, not the metric.
        gram: what ``refine`` and ``update`` measure errors with: every token counts alike (``"plain"``), or with
            ``1 / ‖A_t‖²``, ``A`` the dense output (``"cosine"``).
        damping: share of the Gram matrix's mean diagonal added to its diagonal; None: 0.01 for obs, 0.1 for admm.
        iterations: of admm; the mask tightens in the first half of them.
        saliency: by what admm chooses its mask: the ``"magnitude"`` of a weight on normalised columns, or ``"obs"``,
            the error left after the best update of the others.
        max_swaps: the most swaps in a row.
        tune_epochs: passes over the calibration tokens in which the weights that stay in a block, and its norms, are
            trained to give the dense block's output; 0: none.
        tune_lr: the learning rate of that training.
        allocation: which share of each block is kept: the same of all (``"uniform"``), more where scores have more
            outliers (``"owl"``, arXiv 2310.05175), or where pruning one more weight costs as much everywhere
            (``"error"``). The model's total is always that of ``sparsity``.
        allocation_range: how far a block's sparsity may lie from ``sparsity`` under ``"owl"``; under ``"error"``
            three times as far.

    Raises:
        InputError: for any value outside these, or settings that exclude each other.
    """

    metric: str | Callable = "ace"
    sparsity: float | None = None
    pattern: SparsityPattern | str | None = None
    group: str = "row"
    order: str | None = None
    skip: tuple[str, ...] = ()
    ria_exponent: float = 0.5
    batch_tokens: int = 16384
    token_norm: str | None = None
    refine: str | None = None
    update: str | None = None
    gram: str = "plain"
    damping: float | None = None
    iterations: int = 20
    saliency: str = "obs"
    max_swaps: int = 100
    tune_epochs: int = 0
    tune_lr: float = 2e-4
    allocation: str = "uniform"
    allocation_range: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", SparsityPattern.parse(self.pattern))
        self._check_metric()
        _check_choice("group", self.group, GROUPS)
        self._fill_sparsity()
        self._fill_order()
        _check_count("batch_tokens", self.batch_tokens, 1)
        if self.token_norm is None:
            object.__setattr__(self, "token_norm", "sketch" if self.order == "sequential" else "exact")
        _check_choice("token_norm", self.token_norm, TOKEN_NORMS)
        self._check_solver()
        self._check_tuning()
        self._check_allocation()

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
        _check_choice("order", order, ORDERS)
        if self.group == "model" and order != "block":
            raise InputError("group model compares all scores at once, so order must be block (got 'sequential')")
        object.__setattr__(self, "order", order)

    def _check_solver(self) -> None:
        _check_choice("refine", self.refine, (None, *REFINES))
        _check_choice("update", self.update, (None, *UPDATES))
        _check_choice("gram", self.gram, GRAMS)
        _check_choice("saliency", self.saliency, SALIENCIES)
        _check_count("iterations", self.iterations, 1)
        _check_count("max_swaps", self.max_swaps, 1)
        if self.damping is not None:
            _check_number("damping", self.damping, self.damping >= 0, "a share of the mean diagonal, 0 or more")
            if self.update is None:
                raise InputError(f"damping needs update obs or admm (got {self.damping} without); leave it out")
        if self.gram == "cosine" and not self.solver:
            raise InputError("gram cosine weights the errors of refine or update (got neither); set one of them")
        if self.solver and self.group != "row" and not (self.solver == "obs" and self.group == "matrix"):
            raise InputError(
                f"{self.solver} compares within rows or a pattern's groups, obs alone also within a matrix "
                f"(got group {self.group!r}); use group row"
            )

    def _check_tuning(self) -> None:
        _check_count("tune_epochs", self.tune_epochs, 0)
        _check_number("tune_lr", self.tune_lr, self.tune_lr > 0, "more than 0")
        if self.tune_epochs and self.group == "model":
            raise InputError("tune_epochs trains block after block, group model prunes all at once; use group row")

    def _check_allocation(self) -> None:
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        inside = 0 < self.allocation_range < 1
        _check_number("allocation_range", self.allocation_range, inside, "a difference in sparsity between 0 and 1")
        if self.allocation == "uniform":
            return
        if self.pattern is not None:
            raise InputError(f"allocation {self.allocation} cannot move weights between N:M groups; leave out pattern")
        if self.group == "model":
            raise InputError(f"group model itself allocates (got allocation {self.allocation!r} too); use group row")

    @property
    def solver(self) -> str:
        """What follows the metric: ``"swaps"``, ``"admm"``, ``"swaps+obs"`` …, or "" for the metric alone."""
        return "+".join(part for part in (self.refine, self.update) if part)

    @property
    def used_damping(self) -> float | None:
        """``damping``, or the update's own default; None without an update."""
        return DAMPING.get(self.update) if self.damping is None else self.damping

    def batch_samples(self, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens go through a block at a time."""
        return max(1, self.batch_tokens // max(1, seqlen))

    @property
    def needs(self) -> frozenset[str]:
        """The kinds of statistics (:mod:`ace_ext.pruning.kinds`) to collect before a matrix can be pruned."""
        if not self.solver:
            return metric_needs(self.metric)
        return metric_needs(self.metric) | {COSINE_GRAM if self.gram == "cosine" else GRAM}

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
            "token_norm": self.token_norm,
            "refine": self.refine,
            "update": self.update,
            "gram": self.gram,
            "damping": self.used_damping,
            "iterations": self.iterations,
            "saliency": self.saliency,
            "max_swaps": self.max_swaps,
            "tune_epochs": self.tune_epochs,
            "tune_lr": self.tune_lr,
            "allocation": self.allocation,
            "allocation_range": self.allocation_range,
        }


def _check_choice(name: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))} (got {value!r})")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least} (got {value})")


def _check_number(name: str, value: float, inside: bool, allowed: str) -> None:
    if not (math.isfinite(value) and inside):
        raise InputError(f"{name} must be {allowed} (got {value})")
