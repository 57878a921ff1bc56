"""The grid of a comparison: methods × sparsities × calibration lengths × sources × seeds on one model."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ace_ext.compare.journal import Cell
from ace_ext.compare.method_spec import Method
from ace_ext.data.corpora import CALIBRATION, HELD_OUT, SELF, SOURCES, load_text
from ace_ext.data.perplexity import SEQLEN
from ace_ext.errors import InputError
from ace_ext.models.versions import versions
from ace_ext.pruning.config import BATCH_TOKENS, PruneConfig

EVAL_WINDOWS = 24
"""Windows of each text that a comparison evaluates on, at most, unless told otherwise."""


@dataclass(frozen=True)
class Study:
    """The grid and the settings that all its runs share. ``amounts`` are shares of zeros like ``"0.5"`` and patterns
    like ``"2:4"``; ``lengths`` are pairs ``(nsamples, seqlen)``.

    Raises:
        InputError: for an empty list, a value given twice, and whatever :class:`ace_ext.PruneConfig` refuses of any
            method with any amount. All is checked before a model is loaded.
    """

    model: str
    methods: tuple[Method, ...]
    amounts: tuple[str, ...] = ("0.5",)
    lengths: tuple[tuple[int, int], ...] = ((128, 128),)
    calibrations: tuple[str, ...] = (SELF,)
    seeds: tuple[int, ...] = (0,)
    texts: tuple[str, ...] = ("wiki-mini",)
    eval_seqlen: int = SEQLEN
    eval_windows: int = EVAL_WINDOWS
    skip: tuple[str, ...] = ()
    batch_tokens: int = BATCH_TOKENS
    text_field: str = "text"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("methods", "amounts", "lengths", "calibrations", "seeds", "texts"):
            values = getattr(self, name)
            if not values or len(set(map(str, values))) < len(values):
                raise InputError(f"{name} must be at least one, each given once (got {', '.join(map(str, values))})")
        if self.eval_seqlen < 2 or self.eval_windows < 1:
            found = f"got {self.eval_windows} windows of {self.eval_seqlen}"
            raise InputError(f"evaluation must have at least 1 window of at least 2 tokens ({found})")
        for method, amount in itertools.product(self.methods, self.amounts):
            self.config(method, amount)

    def config(self, method: Method, amount: str) -> PruneConfig:
        """The configuration of a method with an amount."""
        return method.config(**_amount(amount), skip=self.skip, batch_tokens=self.batch_tokens)

    def cells(self) -> Iterator[tuple[Cell, Method]]:
        """The runs of the grid in order; those with the same calibration samples follow one another."""
        data = itertools.product(self.calibrations, self.lengths, self.seeds)
        for (source, (nsamples, seqlen), seed), amount, method in itertools.product(data, self.amounts, self.methods):
            yield Cell(method.label, amount, source, nsamples, seqlen, seed), method

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What must be equal for two runs to be in one table. Evaluation files are recorded by their content."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,  # changes rounding and time
            "skip": list(self.skip),
            "batch_tokens": self.batch_tokens,
            "texts": {text: source_sha256(text, HELD_OUT, self.text_field) for text in self.texts},
            "eval_seqlen": self.eval_seqlen,
            "eval_windows": self.eval_windows,
            "versions": versions(),
        }


def _amount(text: str) -> dict[str, str | float]:
    if ":" in text:
        return {"pattern": text}
    try:
        return {"sparsity": float(text)}
    except ValueError as error:
        raise InputError(f"sparsities must be numbers from 0 to 1 (got {text!r})") from error


def source_sha256(source: str, split: str, text_field: str) -> str | None:
    """The SHA-256, in hex, of a local file's documents; None for a source whose name fixes its text.

    Raises:
        InputError: as :func:`ace_ext.data.corpora.load_text`.
    """
    if (source == SELF and split == CALIBRATION) or source in SOURCES:
        return None
    return hashlib.sha256("\n\n".join(load_text(source, split, text_field)).encode("utf-8")).hexdigest()
