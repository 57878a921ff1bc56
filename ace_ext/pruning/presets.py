"""Presets: named settings of :class:`ace_ext.PruneConfig`. Sparsity or pattern are given in addition."""

import warnings
from typing import Any

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.solver_config import UPDATES, SolverConfig
from ace_ext.pruning.solvers import solvers_of

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"update": "admm", "gram": "sketch", "iterations": 10, "damping": 1.0},
    "balanced": {"update": "admm"},
    "best": {"update": "admm+distill"},
}
"""From the fastest to the most accurate: ``fast`` needs vectors, ``balanced`` Gram matrices, ``best`` gradients."""

DEFAULT_PRESET = "fast"
"""What prunes where neither a metric nor a solver is asked for."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "published-wanda": {"metric": "wanda", "order": "block"},
    "published-sparsegpt": {"update": "obs", "group": "matrix", "order": "block", "gram": "plain"},
    "published-admm": {"update": "admm", "saliency": "magnitude", "iterations": 30, "floor": 0.0, "order": "block"},
}
"""Published methods with their own settings, as baselines: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774) and
ADMM pruning (arXiv 2401.02938)."""

RENAMED_PRESETS = {name.removeprefix("published-"): name for name in PUBLISHED}
"""Their names in version 0.1, which are those of a metric and a solver too."""


def preset_name(name: str) -> str:
    """``name``, or with a warning its present one."""
    present = RENAMED_PRESETS.get(name)
    if present is None:
        return name
    warnings.warn(f"the preset {name!r} is now called {present!r}", FutureWarning, stacklevel=3)
    return present


def preset_config(name: str, **settings: Any) -> PruneConfig:
    """The configuration of a preset; ``settings`` replace the preset's own or are added to them.

    A ``pattern`` drops the preset's group, because a pattern has its own groups. An ``update`` that names only a weight
    solver, or only training, replaces only that part of the preset's, with the options that the new one does not have.

    Raises:
        InputError: no such preset, or as :class:`ace_ext.PruneConfig`.
    """
    known, name = PRESETS | PUBLISHED, preset_name(name)
    if name not in known:
        raise InputError(f"preset must be one of {', '.join(known)} (got {name!r})")
    chosen = dict(known[name])
    if settings.get("pattern") is not None:
        chosen.pop("group", None)
    if settings.get("update") and "update" in chosen:
        settings["update"] = _merged(chosen["update"], settings["update"])
        unused = _options(chosen["update"]) - _options(settings["update"])
        chosen = {name: value for name, value in chosen.items() if name not in unused}
    return PruneConfig(**(chosen | settings))


def _merged(preset: str, given: str) -> str:
    """Merges two updates: for each kind of solver the given one if there is one, else the preset's."""
    parts = given.split("+")
    for kind in UPDATES:
        names = solvers_of(kind)
        if not any(part in names for part in parts):
            parts += [part for part in preset.split("+") if part in names]
    return "+".join(parts)


def _options(update: str) -> set[str]:
    """The names of the options of the solvers that an update names."""
    return {setting.name for solver in SolverConfig(update=update).chosen for setting in solver.options.settings()}
