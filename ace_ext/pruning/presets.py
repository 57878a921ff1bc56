"""Settings by name: keyword arguments of :class:`ace_ext.PruneConfig`, to which the sparsity or pattern is added."""

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig

TUNE_EPOCHS = 6
"""Passes over the calibration tokens where training is asked for and no number is given."""

PRESETS: dict[str, dict] = {
    "fast": {"metric": "ace"},
    "balanced": {"update": "admm"},
    "best": {"update": "admm", "tune_epochs": TUNE_EPOCHS},
}
"""From the quickest to the most faithful."""

PUBLISHED: dict[str, dict] = {
    "wanda": {"metric": "wanda", "order": "block"},
    "sparsegpt": {"update": "obs", "group": "matrix", "order": "block", "gram": "plain"},
    "admm": {"update": "admm", "saliency": "magnitude", "iterations": 30, "order": "block"},
}
"""Other work's methods with their own settings, to compare with: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774)
and ADMM pruning (arXiv 2401.02938)."""


def preset_config(name: str, **settings) -> PruneConfig:
    """The config of a preset's name, in which ``settings`` replace or complete the preset's own.

    With a ``pattern`` the preset's group falls away: a pattern has groups of its own.

    Raises:
        InputError: no such preset, or as :class:`ace_ext.PruneConfig`.
    """
    known = PRESETS | PUBLISHED
    if name not in known:
        raise InputError(f"preset must be one of {', '.join(known)} (got {name!r})")
    chosen = dict(known[name])
    if settings.get("pattern") is not None:
        chosen.pop("group", None)
    return PruneConfig(**(chosen | settings))
