"""What to prune and how. Settings are checked when the configuration is made, before a model is changed."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from ace_ext.errors import InputError
from ace_ext.pruning.criteria import DEFAULT_METRIC, METRICS, CustomMetric, metric_name
from ace_ext.pruning.groups import GROUPS, ComparisonGroup, group_of
from ace_ext.pruning.needs import Needs
from ace_ext.pruning.pattern import SparsityPattern, keep_count
from ace_ext.pruning.settings import Limits, Setting, check_choice, check_settings, option, settings_of
from ace_ext.pruning.solver_config import SolverConfig, solver_names, solver_settings, take_solver_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PruneConfig", "SolverConfig", "SparsityPattern", "config_settings", "keep_count"]

ORDERS = ("block", "sequential")
TOKEN_NORMS = ("exact", "sketch")
ALLOCATIONS = ("uniform", "owl", "error")
BATCH_TOKENS = 16384
"""Default number of calibration tokens that go through a block at a time."""


class FlatSettings(TypedDict, total=False):
    """The keyword-only settings of :class:`PruneConfig`, with the options of the solvers of this package.

    It exists for type checkers. Options of a solver that you registered work by keyword too; for a type checker, give
    them as ``SolverConfig(options=…)``.
    """

    order: str | None
    skip: str | Iterable[str]
    max_dense: float
    ria_exponent: float
    batch_tokens: int
    token_norm: str | None
    allocation: str
    allocation_range: float
    refine: str | None
    update: str | None
    gram: str
    damping: float | None
    iterations: int
    saliency: str
    max_swaps: int
    tune_epochs: int
    tune_lr: float
    distill_passes: int
    distill_lr: float


@dataclass(frozen=True, init=False)
class PruneConfig:
    """The settings of :func:`ace_ext.prune_model`: score, comparison group, solvers and order of work.

    Args:
        metric: a name of :data:`ace_ext.pruning.criteria.METRICS` (default: ``"wanda"``), or a callable
            ``(weight, stats) -> score`` that returns a float tensor of the weight's shape, higher = keep; ``stats`` is
            a :class:`ace_ext.pruning.statistics.LinearStatistics`.
        sparsity: share of zeros in ``[0, 1]``; default 0.5. Not together with ``pattern``.
        pattern: N:M, as a :class:`SparsityPattern` or text like ``"2:4"``; N are kept.
        group: the comparison group, that is, which weights are ranked against each other: those of one ``"row"``, one
            ``"matrix"``, or the whole ``"model"``.
        solver: what follows the metric, as a :class:`SolverConfig`. Or give its settings here by name, as in
            ``PruneConfig(update="admm", iterations=30)``.
        **settings: the settings below, and those of the solvers, by keyword.

    Settings by keyword:

    - ``order``: ``"sequential"`` (default): each Linear's statistics come from inputs that already passed the pruned
      Linears before it. ``"block"``: all statistics of a block come from the dense block, as in Wanda. The group
      ``"model"`` needs all scores at once, so it always uses ``"block"`` and dense blocks throughout.
    - ``skip``: regular expressions, or a single one; a Linear or expert weight whose full name matches one stays dense.
    - ``max_dense``: convolutions, decays and other weights that no known matrix product reads stay dense and are listed
      in the report; if they are more than this share of a block's weights, that is an error.
    - ``ria_exponent``: the power of the input norm in the metric ``ria``.
    - ``batch_tokens``: how many calibration tokens go through a block at a time. Several batches take one forward pass
      of a block too, as long as what they hold between its Linears fits into memory; if not, one for each Linear.
    - ``token_norm``: how the norms ``‖A_t‖`` that weight the tokens are computed: ``"exact"``, from the dense output
      itself, or ``"sketch"``, from a random projection of it (:func:`ace_ext.pruning.statistics.sketched_output`).
      With a sketch the sequential order computes each Linear's output only once, with the pruned weight, so that is
      the default there. The order ``"block"`` computes the dense output anyway, so its default is ``"exact"``.
    - ``allocation``: how sparsity is divided among blocks: the same for all (``"uniform"``), lower where scores have
      more outliers (``"owl"``, arXiv 2310.05175), or so that one more pruned weight costs the same error in every
      block (``"error"``). The model's total is always that of ``sparsity``.
    - ``allocation_range``: how far a block's sparsity may differ from ``sparsity`` under ``"owl"``; under ``"error"``
      three times as far.

    Raises:
        InputError: for a value outside its limits, or settings that exclude each other.
        TypeError: for a setting with an unknown name.
    """

    metric: str | CustomMetric = option(DEFAULT_METRIC, "the score by which weights are kept")
    sparsity: float = option(0.5, "share of zeros")
    pattern: SparsityPattern | None = option(None, "N:M, N kept of M consecutive inputs, e.g. 2:4")
    group: str = option("row", "which weights are compared", Limits(choices=GROUPS))
    order: str = option(None, "order of work in a block (default: sequential)", Limits(choices=ORDERS))
    skip: tuple[str, ...] = option((), "weights to leave dense")
    max_dense: float = option(
        0.1,
        "share of a block's weights that may stay dense because they are in no layout that can be pruned",
        Limits(at_least=0, below=1.0000001, words="a share from 0 to 1"),
    )
    ria_exponent: float = option(0.5, "exponent of the input norm in ria")
    batch_tokens: int = option(BATCH_TOKENS, "tokens that go through a block at a time", Limits(at_least=1))
    token_norm: str = option(
        None,
        "how the output norms that weight tokens are computed: exact, or by a sketch, which is faster in the "
        "sequential order (default: sketch if sequential, exact if block)",
        Limits(choices=TOKEN_NORMS),
    )
    allocation: str = option("uniform", "how blocks share the sparsity", Limits(choices=ALLOCATIONS))
    allocation_range: float = option(
        0.05,
        "how far a block's sparsity may differ",
        Limits(above=0, below=1, words="a difference in sparsity between 0 and 1"),
    )
    solver: SolverConfig = SolverConfig()

    def __init__(
        self,
        metric: str | CustomMetric | None = None,
        sparsity: float | None = None,
        pattern: SparsityPattern | str | None = None,
        group: str = "row",
        solver: SolverConfig | None = None,
        **settings: Unpack[FlatSettings],
    ) -> None:
        flat: dict[str, Any] = dict(settings)
        by_name = take_solver_settings(flat)
        if by_name and solver is not None:
            raise InputError(
                f"give solver=SolverConfig(…) or its settings by name, not both (got {', '.join(by_name)})"
            )
        own = config_settings()
        unknown = [name for name in flat if name not in own]
        if unknown:
            raise TypeError(f"PruneConfig got an unexpected setting {unknown[0]!r}; known are {', '.join(own)}")
        given = {
            "metric": DEFAULT_METRIC if metric is None else metric,
            "sparsity": sparsity,
            "pattern": pattern,
            "group": group,
            **flat,
        }
        for name, setting in own.items():
            object.__setattr__(self, name, given.get(name, setting.default))
        object.__setattr__(self, "skip", _patterns(self.skip))
        object.__setattr__(self, "solver", solver or SolverConfig(**by_name))
        self._complete()
        if metric is not None and not self.metric_decides:
            warnings.warn(
                f"metric {self.metric_name} has no effect: update {self.solver.name} chooses the mask itself; give a "
                f"refine too (then it keeps the metric's mask, refined), or leave out the metric",
                UserWarning,
                stacklevel=2,
            )

    def _complete(self) -> None:
        """Fills in the defaults that depend on other settings, and checks all."""
        if not isinstance(self.pattern, SparsityPattern | str | None):
            raise InputError(f'pattern must be N:M, N weights kept of M (got {str(self.pattern)[:100]}); e.g. "2:4"')
        if isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", SparsityPattern.parse(self.pattern))
        if isinstance(self.metric, str):
            object.__setattr__(self, "metric", metric_name(self.metric))
        if not callable(self.metric) and self.metric not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, or a callable (got {self.metric!r})")
        check_choice("group", self.group, [*GROUPS])
        self._fill_sparsity()
        self._fill_order()
        if self.token_norm is None:
            object.__setattr__(self, "token_norm", "sketch" if self.order == "sequential" else "exact")
        check_settings(self)
        self.solver.check_group(self.comparison)
        self._check_allocation()

    def _fill_sparsity(self) -> None:
        if self.pattern is not None:
            if self.sparsity is not None and self.sparsity != self.pattern.sparsity:
                raise InputError(f"give sparsity or pattern, not both (got {self.sparsity} and {self.pattern})")
            if self.group != "row":
                raise InputError(f"a pattern compares within its own groups: group must be row (got {self.group!r})")
            object.__setattr__(self, "sparsity", self.pattern.sparsity)
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", 0.5)
        is_number = isinstance(self.sparsity, numbers.Real) and not isinstance(self.sparsity, bool)
        if not is_number or not 0 <= self.sparsity <= 1:
            raise InputError(f"sparsity must be a share of zeros from 0 to 1 (got {str(self.sparsity)[:100]})")

    def _fill_order(self) -> None:
        whole_model = GROUPS[self.group].over_matrices
        order = ("block" if whole_model else "sequential") if self.order is None else self.order
        check_choice("order", order, ORDERS)
        if whole_model and order != "block":
            raise InputError(f"group {self.group} compares all scores at once, so order must be block (got {order!r})")
        object.__setattr__(self, "order", order)

    def _check_allocation(self) -> None:
        if self.allocation == "uniform":
            return
        if self.pattern is not None:
            raise InputError(f"allocation {self.allocation} cannot move weights between N:M groups; leave out pattern")
        if self.comparison.over_matrices:
            raise InputError(
                f"group {self.group} itself allocates (got allocation {self.allocation!r} too); use group row"
            )

    @property
    def comparison(self) -> ComparisonGroup:
        """The comparison group that ``pattern`` and ``group`` stand for."""
        return group_of(self.group, self.pattern)

    def batch_samples(self, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens go through a block at a time."""
        return max(1, self.batch_tokens // max(1, seqlen))

    def without_distillation(self) -> PruneConfig:
        """The same without the solver that trains the whole model."""
        solver = self.solver.model_solver
        if solver is None:
            return self
        own = {name: getattr(self, name) for name in config_settings()}
        if not self.metric_decides:
            del own["metric"]
        return PruneConfig(**own, solver=self.solver.without(solver))

    @property
    def metric_decides(self) -> bool:
        """Whether the metric decides which weights are kept: not where a solver chooses the mask, unless the metric's
        scores divide the sparsity among blocks."""
        solver = self.solver.weight_solver
        chosen = self.solver.mask_solver is None and solver is not None and solver.chooses_mask
        return not chosen or self.allocation != "uniform"

    @property
    def needs(self) -> Needs:
        """The kinds of statistics that pruning, allocation and a statistics file need."""
        return Needs.of(self.metric, self.solver, self.allocation)

    @property
    def metric_name(self) -> str:
        """The metric's name; for a callable its ``__name__``."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", "custom")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values for a report, with the solver's settings at the same level."""
        own = {name: getattr(self, name) for name in config_settings()}
        plain = {"metric": self.metric_name, "pattern": str(self.pattern) if self.pattern else None}
        return {**own, **plain, "skip": list(self.skip), **self.solver.to_dict()}


def _patterns(skip: object) -> tuple[str, ...]:
    """``skip`` as a tuple: one pattern stands for a list of one, None for none."""
    if skip is None or isinstance(skip, str):
        return () if skip is None else (skip,)
    if not isinstance(skip, Iterable):
        raise InputError(f"skip must be regular expressions (got {str(skip)[:100]})")
    return tuple(skip)


def config_settings() -> dict[str, Setting]:
    """The settings of :class:`PruneConfig` itself by name, without those of its solvers."""
    return {setting.name: setting for setting in settings_of(PruneConfig)}


def all_settings() -> dict[str, Setting]:
    """Every setting that :class:`PruneConfig` takes by name, including those of all registered solvers."""
    return {**config_settings(), **solver_names(), **solver_settings()}
