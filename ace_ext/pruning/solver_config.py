"""Which solvers follow the metric, and their options: ``SolverConfig``, nested in :class:`ace_ext.PruneConfig`."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ace_ext.errors import InputError
from ace_ext.pruning.groups import ComparisonGroup
from ace_ext.pruning.settings import Limits, Options, Setting, check_choice, option, settings_of
from ace_ext.pruning.solvers import (
    BlockSolver,
    MaskSolver,
    MatrixSolver,
    ModelSolver,
    Solver,
    WeightSolver,
    all_solvers,
    solvers_of,
)

GRAMS = ("plain", "cosine", "sketch")

UPDATES: tuple[type[Solver], ...] = (WeightSolver, BlockSolver, ModelSolver)
"""The kinds of solvers that ``update`` names, at most one of each, in the order in which they run."""

Chosen = TypeVar("Chosen", bound=Solver)


@dataclass(frozen=True)
class SolverConfig:
    """The solvers that follow the metric, and their options.

    Args:
        refine: a mask solver, which improves the metric's mask and changes no weight. An update then keeps this mask.
        update: how the remaining weights compensate for the removed ones: a weight solver, ``"tune"`` (each block is
            trained), ``"distill"`` (the whole model is), or several, joined by ``+`` as in ``"admm+distill"``. Without
            ``refine`` a weight solver chooses the mask itself.
        gram: how refine and update weight the tokens when they measure errors: all the same (``"plain"``), or by
            ``1 / ‖A_t‖²``, ``A`` the dense output (``"cosine"``). ``"sketch"`` is plain, but keeps only a diagonal and
            a few directions of the Gram matrix (:mod:`ace_ext.pruning.sketch`): less memory, and less work.
        options: values for the options that the solvers declare, by name; see :func:`solver_settings`.

    Raises:
        InputError: an unknown solver or option, a value outside its limits, or settings that exclude each other.
    """

    refine: str | None = option(None, "exchange kept and removed weights while the error falls")
    update: str | None = option(None, "how the remaining weights compensate for the removed ones")
    gram: str = option(
        "plain",
        "how refine and update measure errors: all tokens alike, weighted by cosine, or by a sketch that needs vectors "
        "only",
        Limits(choices=GRAMS),
    )
    options: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_choice("refine", self.refine, (None, *solvers_of(MaskSolver)))
        self._normalise_update()
        check_choice("gram", self.gram, GRAMS)
        known = solver_settings()
        unknown = [name for name in self.options if name not in known]
        if unknown:
            raise InputError(f"solver options must be among {', '.join(known)} (got {', '.join(unknown)})")
        for solver in all_solvers():
            self.options_for(solver)  # checks the values, also of solvers that are not used
        for name, value in self.options.items():
            users = _users_of(name)
            if value is not None and len(users) > 1 and not any(s in self.chosen for s in users):
                named = " or ".join(solver.name for solver in users)
                raise InputError(f"{name} needs update {named} (got {value} without); leave it out")
        if self.gram != "plain" and not self.matrix_solvers:
            raise InputError(
                f"gram {self.gram} is how refine or update measure errors (got neither); set one of them, or gram plain"
            )
        if self.gram == "sketch":
            self._check_sketch()

    def _check_sketch(self) -> None:
        for solver in self.matrix_solvers:
            if not solver.takes_sketch:
                able = [name for name, other in solvers_of(MatrixSolver).items() if other.sketch_working_bytes]
                raise InputError(
                    f"gram sketch serves {', '.join(able)}, not {solver.name}, which reads a whole one; use gram plain"
                )

    def _normalise_update(self) -> None:
        """Brings ``update`` to its standard form. ``tune_epochs`` without ``tune`` is accepted with a warning: it asked
        for training in version 0.1."""
        known = update_names()
        parts = list(dict.fromkeys(part.strip() for part in (self.update or "").split("+") if part.strip()))
        for part in parts:
            if part not in known:
                raise InputError(
                    f"update must be one of {', '.join(('None', *known))} (got {self.update!r}); join several by +"
                )
        epochs = self.options.get("tune_epochs")
        if isinstance(epochs, int) and epochs > 0 and "tune" not in parts:
            warnings.warn("tune_epochs alone will not train; give update='tune' too", DeprecationWarning, stacklevel=4)
            parts.append("tune")
        if epochs == 0 and "tune" in parts:
            parts.remove("tune")
        for kind in UPDATES:
            names = solvers_of(kind)
            if sum(part in names for part in parts) > 1:
                raise InputError(f"update takes only one of {', '.join(names)} (got {self.update!r})")
        parts.sort(key=list(known).index)
        object.__setattr__(self, "update", "+".join(parts) or None)

    def _chosen(self, kind: type[Chosen]) -> Chosen | None:
        names = [self.refine] if kind.stage == "refine" else (self.update or "").split("+")
        return next((solver for name, solver in solvers_of(kind).items() if name in names), None)

    @property
    def mask_solver(self) -> MaskSolver | None:
        """The solver that ``refine`` names."""
        return self._chosen(MaskSolver)

    @property
    def weight_solver(self) -> WeightSolver | None:
        """The weight solver that ``update`` names."""
        return self._chosen(WeightSolver)

    @property
    def block_solver(self) -> BlockSolver | None:
        """The solver that trains each block, if ``update`` names one."""
        return self._chosen(BlockSolver)

    @property
    def model_solver(self) -> ModelSolver | None:
        """The solver that trains the whole model, if ``update`` names one."""
        return self._chosen(ModelSolver)

    @property
    def matrix_solvers(self) -> list[MatrixSolver]:
        """The solvers that work on one matrix, in the order in which they run."""
        return [solver for solver in (self.mask_solver, self.weight_solver) if solver is not None]

    @property
    def chosen(self) -> list[Solver]:
        """All solvers that are used, in the order in which they run."""
        trained = (self.block_solver, self.model_solver)
        return [*self.matrix_solvers, *(solver for solver in trained if solver is not None)]

    @property
    def name(self) -> str:
        """The names of the matrix solvers: ``"swaps"``, ``"swaps+admm"`` …, each once, or "" for the metric alone."""
        return "+".join(dict.fromkeys(solver.name for solver in self.matrix_solvers))

    def options_for(self, solver: Solver) -> Options:
        """The solver's options, with the given values in place of its defaults."""
        own = {setting.name for setting in solver.options.settings()}
        return solver.options(**{n: v for n, v in self.options.items() if n in own and v is not None})

    def without(self, solver: Solver) -> "SolverConfig":
        """The same without a solver of ``update``, and without its options."""
        parts = [part for part in (self.update or "").split("+") if part != solver.name]
        own = {setting.name for setting in solver.options.settings()}
        options = {name: value for name, value in self.options.items() if name not in own}
        return replace(self, update="+".join(parts) or None, options=options)

    def check_group(self, group: ComparisonGroup) -> None:
        """Raises :class:`InputError` if a solver does not support this comparison group."""
        name = "row" if group.name == "N:M" else group.name
        if any(name not in solver.groups for solver in self.matrix_solvers):
            raise InputError(
                f"{self.name} compares within rows or a pattern's groups, obs and mean alone also within a matrix "
                f"(got group {name!r}); use group row"
            )
        if self.block_solver is not None and group.over_matrices:
            raise InputError(
                f"update {self.block_solver.name} trains block after block, group {name} prunes all at once; "
                "use group row"
            )

    def to_dict(self) -> dict[str, object]:
        """All settings by name, flat, as reports hold them: an option of a solver that is not used at its ``unused``
        value, or None where several solvers have it."""
        weight = self.weight_solver
        update = None if weight is None else weight.name
        values: dict[str, object] = {"refine": self.refine, "update": update, "gram": self.gram}
        for name, setting in solver_settings().items():
            users = [solver for solver in self.chosen if solver in _users_of(name)]
            if users:
                values[name] = getattr(self.options_for(users[0]), name)
            else:
                given = self.options.get(name)
                alone = len(_users_of(name)) == 1
                values[name] = given if given is not None else setting.unused if alone else None
        return values


def solver_settings() -> dict[str, Setting]:
    """The options of all registered solvers by name, weight solvers first."""
    found: dict[str, Setting] = {}
    for kind in (WeightSolver, MaskSolver, BlockSolver, ModelSolver):
        for solver in solvers_of(kind).values():
            for setting in solver.options.settings():
                found.setdefault(setting.name, setting)
    return found


def update_names() -> list[str]:
    """The names that ``update`` takes, in the order in which they run."""
    return [name for kind in UPDATES for name in solvers_of(kind)]


def solver_names() -> dict[str, Setting]:
    """The settings of :class:`SolverConfig` itself: ``refine``, ``update`` and ``gram``."""
    return {setting.name: setting for setting in settings_of(SolverConfig)}


def option_help(name: str) -> str:
    """The line of help of a solver option, with the solvers that declare it and their defaults."""
    users = _users_of(name)
    words = {setting.help for solver in users for setting in solver.options.settings() if setting.name == name}
    defaults = [
        f"{setting.default} for {solver.name}" if len(users) > 1 else str(setting.default)
        for solver in users
        for setting in solver.options.settings()
        if setting.name == name
    ]
    return f"{', '.join(solver.name for solver in users)}: {'; '.join(sorted(words))} (default: {', '.join(defaults)})"


def _users_of(name: str) -> list[Solver]:
    """The registered solvers that declare an option with this name."""
    return [s for s in all_solvers() if any(setting.name == name for setting in s.options.settings())]


def take_solver_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Removes the settings of a :class:`SolverConfig` from flat settings; returns them as its keyword arguments."""
    taken: dict[str, Any] = {name: settings.pop(name) for name in list(settings) if name in solver_names()}
    options = {name: settings.pop(name) for name in list(settings) if name in solver_settings()}
    return {**taken, **({"options": options} if options else {})}
