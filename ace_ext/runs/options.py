"""What ``ace-prune run`` and ``plan`` are told beside the configuration: which text, and how to go about it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ace_ext.data.corpora import CALIBRATION, SELF, SOURCES, load_text
from ace_ext.data.windows import CalibrationData, load_windows
from ace_ext.engine.distributed import launched
from ace_ext.errors import InputError
from ace_ext.formats import DEFAULT_FORMAT, format_named
from ace_ext.pruning.config import PruneConfig

OFFLOAD = ("auto", "disk", "none")


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much of it."""

    source: str = SELF
    nsamples: int = 128
    seqlen: int = 128
    seed: int = 0
    text_field: str = "text"

    def check(self) -> None:
        """Reads a file of the user's, so that a bad one shows before a model is loaded."""
        if self.source not in (SELF, *SOURCES):
            load_text(self.source, CALIBRATION, self.text_field)

    def load(self, tokenizer, model: nn.Module | None) -> CalibrationData:
        return load_windows(
            self.source, tokenizer, self.nsamples, self.seqlen, self.seed, model=model, text_field=self.text_field
        )


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it; none of this changes the result but ``save_stats`` and ``stats``."""

    overwrite: bool = False
    resume: bool = False
    """Go on where an earlier run stopped. The group ``model`` cuts once, at its end, and always starts over."""
    offload: str = "auto"
    max_memory: int | None = None
    """Bytes of resident memory that the run may take. On the CPU this sets, for good, how much of what it frees the
    process keeps: :func:`ace_ext.process_memory.return_freed_memory`."""
    save_stats: Path | None = None
    """Keep the statistics, taken from the dense model: each block's inputs then come from dense blocks before it, and
    not from pruned ones as otherwise in order ``block``. So the file serves any sparsity, pattern and metric."""
    stats: Path | None = None
    """Prune from such a file, without a forward pass: the bytes of a run that saves it with the same configuration."""
    format: str = DEFAULT_FORMAT
    """A name of :data:`ace_ext.formats.FORMATS`."""


@dataclass(frozen=True)
class RunRequest:
    """All that ``run`` and ``plan`` are asked."""

    model: str
    config: PruneConfig
    calibration: Calibration
    options: RunOptions
    device: torch.device
    dtype: str = "auto"

    @property
    def writes_own_text(self) -> bool:
        """Whether the model writes its calibration text, for which all of it must be in memory."""
        return self.calibration.source == SELF and self.options.stats is None


def check_request(request: RunRequest) -> None:
    """That the options go together.

    Raises:
        InputError: naming those that do not, and what to do.
    """
    config, options = request.config, request.options
    format_named(options.format)
    if options.offload not in OFFLOAD:
        raise InputError(f"offload must be one of {', '.join(OFFLOAD)} (got {options.offload!r})")
    if options.offload == "disk" and config.comparison.over_matrices:
        raise InputError(
            "offload disk holds one block at a time, and group model compares all: use group row or matrix"
        )
    if options.offload == "disk" and request.writes_own_text:
        raise InputError(
            "calibration self needs the whole model in memory to write text; give another text with offload"
        )
    if config.solver.block_solver is not None:
        _check_tuning(options)
    if options.save_stats and options.stats:
        raise InputError("give save-stats or stats, not both")
    for name, given in (("save-stats", options.save_stats), ("stats", options.stats)):
        if given and config.order != "block":
            raise InputError(f"{name} is for statistics of dense blocks: give order block (got {config.order!r})")
    if options.save_stats and (options.save_stats.is_dir() or not options.save_stats.absolute().parent.is_dir()):
        raise InputError(f"save-stats must be a file in a folder that exists (got {str(options.save_stats)!r})")


def _check_tuning(options: RunOptions) -> None:
    reasons = {
        "stats": (options.stats is not None, "a file of statistics holds no inputs to train on"),
        "save-stats": (
            options.save_stats is not None,
            "those kept are of dense blocks, and training changes them",
        ),
        "torchrun": (launched(), "one process trains a block"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise InputError(f"tune does not go with {name}: {why}; leave out one of them")
