"""The grid of a comparison: methods × sparsities × calibration lengths × sources × seeds on one model."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ace_ext.compare.journal import Cell
from ace_ext.data.bos import AUTO, MODES, default_mode
from ace_ext.data.corpora import BUNDLED, HELD_OUT, SELF, source_sha256
from ace_ext.data.media_items import is_media
from ace_ext.data.perplexity import SEQLEN
from ace_ext.data.tasks import Tasks
from ace_ext.errors import InputError
from ace_ext.fingerprint import arithmetic, fingerprint_of_files, fingerprint_of_model
from ace_ext.models.versions import versions
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.method import Method
from ace_ext.pruning.settings import check_choice

EVAL_WINDOWS = 24
"""The default maximum of windows of each evaluation text."""


NOTHING = "0"
"""The amount of a method that only quantizes."""

BOTH = "both"
"""A mode of the BOS token for a grid: each published method runs twice, as its code does and with the token."""
WITH_BOS = " with BOS"
"""What follows the label of a published method in its second run."""


def _check_list(name: str, values: tuple[object, ...]) -> None:
    if not values or len(set(map(str, values))) < len(values):
        raise InputError(f"{name} must be at least one, each given once (got {', '.join(map(str, values))})")


@dataclass(frozen=True)
class Grid:
    """What differs between the runs of a comparison. ``amounts`` are shares of zeros like ``"0.5"`` and patterns like
    ``"2:4"``; a method that only quantizes runs once, with the amount ``"0"``. ``lengths`` are pairs ``(nsamples,
    seqlen)``. ``bos`` is the same for all runs: whether calibration samples begin with the BOS token. None:
    :func:`ace_ext.data.bos.default_mode` of each method. :data:`BOTH`: the same, and published methods run once more
    with the mode ``auto``, under their label with :data:`WITH_BOS`; not on text that the model writes, which begins
    with the token in any case.

    Raises:
        InputError: a list is empty, a value is given twice, or ``bos`` is unknown.
    """

    methods: tuple[Method, ...]
    amounts: tuple[str, ...] = ("0.5",)
    lengths: tuple[tuple[int, int], ...] = ((128, 128),)
    calibrations: tuple[str, ...] = (BUNDLED,)
    seeds: tuple[int, ...] = (0,)
    bos: str | None = None

    def __post_init__(self) -> None:
        _check_list(
            "methods", tuple(method.label for method in self.methods)
        )  # labels identify the runs in the journal
        for each in fields(self):
            if each.name not in ("methods", "bos"):
                _check_list(each.name, getattr(self, each.name))
        if self.bos is not None:
            check_choice("bos", self.bos, (*MODES, BOTH))

    def bos_mode(self, method: Method, cell: Cell) -> str:
        """The mode for the calibration samples of a run of a method."""
        if self.bos is not None and self.bos != BOTH:
            return self.bos
        return AUTO if cell.method != method.label else default_mode(method.published, cell.calibration == SELF)

    def cells(self) -> Iterator[tuple[Cell, Method]]:
        """The runs of the grid in order. Runs with the same calibration samples are consecutive."""
        data = itertools.product(self.calibrations, self.lengths, self.seeds)
        for (source, (nsamples, seqlen), seed), (amount, method) in itertools.product(data, self.targets()):
            yield Cell(method.label, amount, source, nsamples, seqlen, seed), method
            if self.bos == BOTH and method.published and source != SELF:
                yield Cell(method.label + WITH_BOS, amount, source, nsamples, seqlen, seed), method

    def targets(self) -> list[tuple[str, Method]]:
        """Each amount with each method; methods that only quantize stand first, once."""
        quantize = [(NOTHING, method) for method in self.methods if not method.prunes]
        prune = [method for method in self.methods if method.prunes]
        return [*quantize, *itertools.product(self.amounts, prune)]


@dataclass(frozen=True)
class Evaluation:
    """The held-out texts on which perplexity is measured, with at most ``windows`` of ``seqlen`` tokens each. Of a
    network that is no causal language model agreement is measured, on texts, or on images or sound. ``bos``:
    whether windows begin with the BOS token; the dense model decides it, for all methods alike. ``tasks``: downstream
    tasks to evaluate too.

    Raises:
        InputError: there is no text, one is given twice, there are too few windows or tokens, or ``bos`` is unknown.
    """

    texts: tuple[str, ...] = ("wiki-mini",)
    seqlen: int = SEQLEN
    windows: int = EVAL_WINDOWS
    bos: str = AUTO
    tasks: Tasks = Tasks()

    def __post_init__(self) -> None:
        _check_list("texts", self.texts)
        check_choice("bos", self.bos, MODES)
        if self.seqlen < 2 or self.windows < 1:
            found = f"got {self.windows} windows of {self.seqlen}"
            raise InputError(f"evaluation must have at least 1 window of at least 2 tokens ({found})")


@dataclass(frozen=True)
class Study:
    """A comparison: its grid, and what all its runs share.

    Raises:
        InputError: :class:`ace_ext.PruneConfig` refuses a method with an amount. All of them are checked before a model
            is loaded.
    """

    model: str
    grid: Grid
    evaluation: Evaluation = Evaluation()
    skip: tuple[str, ...] = ()
    text_field: str = "text"
    dtype: str = "auto"
    groups: Mapping[str, str] = field(default_factory=dict)
    """The comparison groups for shares of zeros, by the method's label. Other methods have their default group."""

    def __post_init__(self) -> None:
        for amount, method in self.grid.targets():
            self.config(method, amount)

    def check_text(self) -> None:
        """Checks that all sources are text.

        Raises:
            InputError: one has images or sound.
        """
        found = [source for source in (*self.grid.calibrations, *self.evaluation.texts) if is_media(source)]
        if found:
            raise InputError(f"{self.model!r} reads text, and {found[0]} has images or sound; give texts")

    def config(self, method: Method, amount: str) -> PruneConfig:
        """The configuration of a method for an amount."""
        try:
            target = _amount(amount)
            group = None if "pattern" in target else self.groups.get(method.label)
            return PruneConfig(method, **target, group=group, skip=self.skip)
        except InputError as error:
            raise InputError(f"method {method.label!r}: {error}") from error

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What must be equal in all runs of a table. The model's and evaluation files are recorded by their content."""
        return {
            "model": self.model,
            "files": _model_files(self.model),
            "dtype": self.dtype,
            "device": device.type,
            **(arithmetic() if device.type == "cpu" else {"threads": None}),  # changes rounding and time
            "skip": list(self.skip),
            "texts": {text: source_sha256(text, HELD_OUT, self.text_field) for text in self.evaluation.texts},
            "eval_seqlen": self.evaluation.seqlen,
            "eval_windows": self.evaluation.windows,
            "eval_bos": self.evaluation.bos,
            "bos": None if self.grid.bos == BOTH else self.grid.bos,  # BOTH only adds runs
            "versions": versions(),
            **self.evaluation.tasks.settings(),
        }


def _model_files(model: str) -> dict[str, str] | None:
    """The hashes of the files of a model on this machine, by name. None for a name of the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return fingerprint_of_model(path)
    return fingerprint_of_files([path]) if path.is_file() else None


def _amount(text: str) -> dict[str, Any]:
    if ":" in text:
        return {"pattern": text}
    try:
        return {"sparsity": float(text)}
    except ValueError as error:
        raise InputError(f"sparsities must be numbers from 0 to 1 (got {text!r})") from error
