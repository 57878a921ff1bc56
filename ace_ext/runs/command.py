"""The command that repeats a run, for its report and its model card. It leaves out the paths of folders, options that
do not change the output, and ``--format``: a packed folder has the report of its dense form."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_ext.data.bos import default_mode
from ace_ext.data.corpora import SELF
from ace_ext.data.mixture import without_folders
from ace_ext.models.location import hub_name
from ace_ext.pruning.config import MAX_DENSE, PruneConfig
from ace_ext.runs.options import EVALUATE_AUTO, Calibration, RunRequest

if TYPE_CHECKING:  # at run time only a distillation loads ace_ext.healing
    from ace_ext.healing.settings import HealSettings

OUTPUT = "OUTPUT"
"""The placeholder for the output folder, whose name does not change the output."""


def run_command(request: RunRequest) -> str | None:
    """The command line of a pruning run. None if its scores are a Python function."""
    config = request.config
    method = config.method
    if callable(method.scored_by.metric):
        return None
    flags: dict[str, Any] = {"model": hub_name(request.model) or Path(request.model).name, "output": OUTPUT}
    if config.remove is not None:
        flags["remove"] = config.remove
    if config.only_removes:
        return _line("run", {**flags, **_inputs(request)})
    named = method.published  # the choice of BOS depends on that name; the stages' text lacks it
    flags["method"] = method.label if named else method.preset or str(method)
    if method.prunes:
        flags |= {"pattern": config.pattern} if config.pattern else {"sparsity": config.sparsity}
    if method.prunes and config.pattern is None and config.group != PruneConfig(method).group:
        flags["group"] = config.group
    if config.max_dense != MAX_DENSE:
        flags["max-dense"] = config.max_dense
    return _line("run", {**flags, "skip": config.skip, "towers": config.towers, **_inputs(request)})


def heal_command(
    text: Calibration, recorded: Calibration, settings: "HealSettings", tokens: int | None, minutes: float | None
) -> str:
    """The command line of a distillation.

    Args:
        text: the text to train on.
        recorded: the default text.
        settings: of the training; their seed is that of the text.
        tokens: the number of tokens to train on, if it was given.
        minutes: the time limit, if it was given.
    """
    names = {"source": "calibration", "seqlen": "seqlen", "seed": "seed", "text_field": "text-field", "bos": "bos"}
    defaults = type(settings)()
    changed = {n: v for n, v in vars(settings).items() if n != "seed" and v != getattr(defaults, n)}
    other = {flag: getattr(text, n) for n, flag in names.items() if getattr(text, n) != getattr(recorded, n)}
    if "calibration" in other:
        other["calibration"] = without_folders(other["calibration"])
    return _line("heal", {"": "PRUNED", "output": OUTPUT, "tokens": tokens, "minutes": minutes, **changed, **other})


def _inputs(request: RunRequest) -> dict[str, Any]:
    """The flags for what a run reads in addition to the model."""
    text, options = request.calibration, request.options
    dtype = {} if request.dtype == "auto" else {"dtype": request.dtype}
    if options.stats is not None:
        return {**dtype, "stats": options.stats.name}
    found: dict[str, Any] = {
        "calibration": without_folders(text.source),
        "nsamples": text.nsamples,
        **({"seqlen": text.seqlen} if text.reads_text else {}),
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
    """A command. A list becomes a flag that is given several times; None is left out."""
    words = ["ace-prune", verb]
    for name, value in flags.items():
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            words += [*([f"--{name.replace('_', '-')}"] if name else []), str(one)]
    return shlex.join(words)
