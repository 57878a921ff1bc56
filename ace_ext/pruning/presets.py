"""Settings by name: keyword arguments of :class:`ace_ext.PruneConfig`, to which the sparsity or pattern is added."""

from typing import Any

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.solvers import BlockSolver, WeightSolver, solvers_of

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"metric": "ace"},
    "balanced": {"update": "admm"},
    "best": {"update": "admm+tune"},
}
"""From the quickest to the most faithful."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "wanda": {"metric": "wanda", "order": "block"},
    "sparsegpt": {"update": "obs", "group": "matrix", "order": "block", "gram": "plain"},
    "admm": {"update": "admm", "saliency": "magnitude", "iterations": 30, "order": "block"},
}
"""Other work's methods with their own settings, to compare with: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774)
and ADMM pruning (arXiv 2401.02938)."""


def preset_config(name: str, **settings: Any) -> PruneConfig:
    """The config of a preset's name, in which ``settings`` replace or complete the preset's own.

    With a ``pattern`` the preset's group falls away: a pattern has groups of its own. An ``update`` replaces the weight
    solver, the training, or both, as far as it names them.

    Raises:
        InputError: no such preset, or as :class:`ace_ext.PruneConfig`.
    """
    known = PRESETS | PUBLISHED
    if name not in known:
        raise InputError(f"preset must be one of {', '.join(known)} (got {name!r})")
    chosen = dict(known[name])
    if settings.get("pattern") is not None:
        chosen.pop("group", None)
    if settings.get("update") and "update" in chosen:
        settings["update"] = _merged(chosen["update"], settings["update"])
    return PruneConfig(**(chosen | settings))


def _merged(preset: str, given: str) -> str:
    """Both updates in one; of each kind the given one, where there is one."""
    parts = given.split("+")
    for kind in (WeightSolver, BlockSolver):
        names = solvers_of(kind)
        if not any(part in names for part in parts):
            parts += [part for part in preset.split("+") if part in names]
    return "+".join(parts)
