"""The command that repeats a run, for its report and its model card: without the names of folders, and without what
changes no byte."""

import shlex
from pathlib import Path
from typing import Any

from ace_ext.data.bos import default_mode
from ace_ext.data.corpora import SELF
from ace_ext.healing.settings import HealSettings
from ace_ext.models.location import hub_name
from ace_ext.pruning.config import MAX_DENSE, PruneConfig
from ace_ext.runs.options import EVALUATE_AUTO, Calibration, RunRequest

OUTPUT = "OUTPUT"
"""Stands for the output folder, whose name is no part of what is written."""


def run_command(request: RunRequest) -> str | None:
    """The command line of a pruning run. None if no command has it: scores of a function."""
    config = request.config
    method = config.method
    if callable(method.scored_by.metric):
        return None
    flags: dict[str, Any] = {"model": hub_name(request.model) or Path(request.model).name, "output": OUTPUT}
    named = method.published  # the choice of BOS depends on that name, which the stages' text does not have
    flags["method"] = method.label if named else method.preset or str(method)
    flags |= {"pattern": config.pattern} if config.pattern else {"sparsity": config.sparsity}
    if config.pattern is None and config.group != PruneConfig(method).group:
        flags["group"] = config.group
    if config.max_dense != MAX_DENSE:
        flags["max-dense"] = config.max_dense
    return _line("run", {**flags, "skip": config.skip, **_inputs(request)})


def heal_command(
    text: Calibration, recorded: Calibration, settings: HealSettings, tokens: int | None, minutes: float | None
) -> str:
    """The command line of a distillation.

    Args:
        text: its text.
        recorded: the text that is used if none is given.
        settings: how it trains; their seed is that of the text.
        tokens: to train on, if they were given.
        minutes: that it may take, if they were given.
    """
    names = {"source": "calibration", "seqlen": "seqlen", "seed": "seed", "text_field": "text-field", "bos": "bos"}
    changed = {n: v for n, v in vars(settings).items() if n != "seed" and v != getattr(HealSettings(), n)}
    other = {flag: getattr(text, n) for n, flag in names.items() if getattr(text, n) != getattr(recorded, n)}
    if "calibration" in other:
        other["calibration"] = Path(other["calibration"]).name
    return _line("heal", {"": "PRUNED", "output": OUTPUT, "tokens": tokens, "minutes": minutes, **changed, **other})


def _inputs(request: RunRequest) -> dict[str, Any]:
    """The flags of what a run reads beside the model."""
    text, options = request.calibration, request.options
    dtype = {} if request.dtype == "auto" else {"dtype": request.dtype}
    if options.stats is not None:
        return {**dtype, "stats": options.stats.name}
    found: dict[str, Any] = {
        "calibration": Path(text.source).name,
        "nsamples": text.nsamples,
        "seqlen": text.seqlen,
        "seed": text.seed,
    }
    if text.bos != default_mode(request.config.method.published, own_text=text.source == SELF):
        found["bos"] = text.bos
    if text.text_field != Calibration().text_field:
        found["text-field"] = text.text_field
    if text.evaluate != EVALUATE_AUTO:
        found["evaluate"] = Path(text.evaluate).name
    if options.save_stats is not None:
        found["save-stats"] = options.save_stats.name
    return {**dtype, **found}


def _line(verb: str, flags: dict[str, Any]) -> str:
    """A command; a list is a flag given several times, and None is left out."""
    words = ["ace-prune", verb]
    for name, value in flags.items():
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            words += [*([f"--{name.replace('_', '-')}"] if name else []), str(one)]
    return shlex.join(words)
