"""The arguments of ``ace-prune heal``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ace_ext.errors import InputError
from ace_ext.healing.settings import HealSettings
from ace_ext.runs.holdout import HeldOutText
from ace_ext.runs.options import Calibration

TOKENS = 65536
"""Tokens to train on, if neither tokens nor minutes are given."""


@dataclass(frozen=True)
class LongerRun:
    """A run whose last part is a distillation."""

    fingerprint: dict[str, Any]
    """Everything that the output depends on, as plain values."""
    held_out: HeldOutText | None
    """The text on which it measures perplexity, if it does."""


@dataclass(frozen=True)
class HealOptions:
    """How much a run on files trains, and options that do not change its output. ``max_memory`` is an exception: it
    decides how many blocks are trained together."""

    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps."""
    minutes: float | None = None
    """Instead of tokens: about how long the run may take. Speed is measured once. A resumed run keeps the number of
    tokens that was computed from it."""
    windows: int | None = None
    """Instead of tokens or minutes: windows of text, including held-out ones."""
    overwrite: bool = False
    """Replace the output folder if it exists."""
    resume: bool = False
    """Continue an interrupted run."""
    max_memory: int | None = None
    """Bytes of resident memory that the run may use; None: what the system can give."""
    longer: LongerRun | None = None
    """The run whose last part this is; None: a run of its own."""

    def check(self) -> None:
        """Raises :class:`ace_ext.InputError` for an invalid budget."""
        if sum(budget is not None for budget in (self.tokens, self.minutes, self.windows)) > 1:
            raise InputError("give tokens, minutes or windows, only one of them")
        if self.tokens is not None and not 1 <= self.tokens < 2**40:
            raise InputError(f"tokens must be at least 1 and below 2**40 (got {str(self.tokens)[:100]})")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise InputError(f"minutes must be more than 0 (got {self.minutes})")


@dataclass(frozen=True)
class HealRequest:
    """All arguments of ``ace-prune heal``."""

    folder: str
    """The pruned folder."""
    output: str | Path
    text: Calibration
    """The text; its ``nsamples`` is not used. Default on the command line:
    :func:`ace_ext.runs.heal_text.recorded_text`."""
    dense: str | None = None
    """The dense model; None: the one that the folder's report names."""
    settings: HealSettings = field(default_factory=HealSettings)
    options: HealOptions = field(default_factory=HealOptions)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
