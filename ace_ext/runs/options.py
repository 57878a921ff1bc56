"""The arguments of ``ace-prune run`` and ``plan`` in addition to the pruning configuration: the calibration text and
the options of the run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ace_ext.data.bos import AUTO, MODES, BosChoice, choose_bos, settled_bos
from ace_ext.data.corpora import BUNDLED, CALIBRATION, SELF, SOURCES, load_text, texts_of
from ace_ext.data.mixture import samples_of
from ace_ext.data.requests import check_request as check_numbers
from ace_ext.data.requests import sample_count
from ace_ext.data.windows import CalibrationData, load_windows
from ace_ext.engine.distributed import launched
from ace_ext.errors import InputError
from ace_ext.fingerprint import inputs_sha256
from ace_ext.formats import DEFAULT_FORMAT, format_named
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.settings import check_choice
from ace_ext.runs.own_files import check_replaceable, is_statistics, stored_sizes

EVALUATE_AUTO, EVALUATE_NEVER = "auto", "never"
"""The values of :attr:`Calibration.evaluate` that are not texts."""

OFFLOAD = ("auto", "disk", "none")
"""``disk``: one block at a time is read from the files; ``auto``: only if the whole model does not fit; ``none``:
never."""


Reader: TypeAlias = Callable[[Path, "Calibration"], Iterable[Mapping[str, Tensor]]]
"""``(folder of the model, calibration) -> batches``: arguments of the model's calls, as its own processor returns them.
Raises :class:`InputError` for files that cannot be read, before it returns."""


@dataclass(frozen=True)
class Calibration:
    """The calibration text: its source (a text, or a mixture: :mod:`ace_ext.data.mixture`), ``nsamples`` samples of
    ``seqlen`` tokens, the seed that chooses them, and whether they begin with the BOS token
    (:data:`ace_ext.data.bos.MODES`)."""

    source: str = BUNDLED
    nsamples: int = 128
    seqlen: int = 128
    seed: int = 0
    text_field: str = "text"
    bos: str = AUTO
    evaluate: str = EVALUATE_NEVER
    """The text on which perplexity is measured before and after, ``auto`` or ``never``; for other networks the text,
    images or sound on which agreement with the dense model is measured (:mod:`ace_ext.runs.holdout`)."""
    reads_text: ClassVar[bool] = True
    """Whether the source is text; if not, it is an :class:`InputCalibration`."""

    def check(self) -> None:
        """Reads the texts that are a user's files, so that an error is found before the model is loaded.

        Raises:
            InputError: a file cannot be read, texts cannot be mixed, or the mode ``bos`` is unknown.
        """
        check_choice("bos", self.bos, MODES)
        check_numbers(self.nsamples, self.seqlen, self.seed)
        if not self.reads_text:
            return
        texts = texts_of(self.source)
        samples_of(texts, self.nsamples)
        for part in texts:
            if part.source not in (SELF, *SOURCES):
                load_text(part.source, CALIBRATION, self.text_field)

    @property
    def sources(self) -> list[str]:
        """What the samples are read from: the texts of a mixture, or the one source."""
        return [part.source for part in texts_of(self.source)] if self.reads_text else [self.source]

    def choose_bos(
        self, tokenizer: Tokenizer, model: nn.Module | None, logits: Callable[[Tensor], Tensor] | None = None
    ) -> BosChoice:
        """Whether the samples begin with the BOS token; arguments and errors as :func:`ace_ext.data.bos.choose_bos`."""
        return choose_bos(self.bos, tokenizer, model, own_text=self.source == SELF, logits=logits)

    def load(
        self,
        tokenizer: Tokenizer,
        model: nn.Module | None,
        bos: BosChoice | None = None,
        progress: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> CalibrationData:
        """Draws the samples; ``model`` writes the text if the source is ``self``. ``bos``: a choice already made.
        ``progress``, ``note``: as for :func:`ace_ext.data.windows.load_windows`.

        Raises:
            InputError: the text cannot be read or is too short.
        """
        return load_windows(
            self.source,
            tokenizer,
            self.nsamples,
            self.seqlen,
            self.seed,
            model=model,
            bos=bos or self.bos,
            text_field=self.text_field,
            progress=progress,
            note=note,
        )

    def describe(self, data: CalibrationData) -> dict[str, Any]:
        """The description of the samples in a report and a fingerprint. It names the text's field if that is not the
        default."""
        field_of_text = {} if self.text_field == Calibration().text_field else {"text_field": self.text_field}
        return {
            "source": data.source,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": data.seed,
            "sha256": data.sha256,
            "bos": data.bos.to_dict(),
            **field_of_text,
        }


@dataclass(frozen=True)
class InputCalibration(Calibration):
    """Calibration that is no text: ``reader`` reads the model's inputs, ``nsamples`` of them, from ``source``.
    ``seqlen`` is only the number of tokens of a sample by which memory is estimated."""

    reads_text: ClassVar[bool] = False
    reader: Reader = field(kw_only=True)

    def read(self, folder: Path | None) -> list[dict[str, Tensor]]:
        """The model's inputs by :attr:`reader`; ``folder``: the model's.

        Raises:
            InputError: there are none, or they cannot be read.
        """
        if folder is None:
            raise InputError("calibration of this kind needs a model folder with the files of its processor")
        batches = [dict(batch) for batch in self.reader(folder, self)]
        if not batches:
            raise InputError(f"calibration {self.source!r} holds nothing to read")
        return batches

    def describe_inputs(self, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
        """The description of batches of inputs in a report and a fingerprint. ``nsamples`` counts those that were read;
        ``inputs`` gives the shape of one sample and the dtype, by name."""
        inputs = {
            name: {"shape": list(value.shape[1:]), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in batches[0].items()
        }
        read = {"source": self.source, "nsamples": sample_count(batches), "seed": self.seed}
        return {**read, "inputs": inputs, "sha256": inputs_sha256(batches)}


@dataclass(frozen=True)
class RunOptions:
    """Options of a run on files. Only ``save_stats`` and ``stats`` change the pruned weights."""

    overwrite: bool = False
    """Replace the output folder if it exists."""
    resume: bool = False
    """Continue where an earlier run stopped. The group ``model`` prunes only at the end, so it always starts over."""
    offload: str = "auto"
    """One of ``OFFLOAD``."""
    max_memory: int | None = None
    """Bytes of resident memory that the run may use. On the CPU it also changes how the process returns freed memory to
    the system, even after the run: :func:`ace_ext.process_memory.return_freed_memory`."""
    save_stats: Path | None = None
    """Save the statistics of the dense model to this file. Each block then reads the output of dense blocks. (With
    ``order=block`` alone it reads the output of pruned blocks.) So the file serves any sparsity, pattern and score."""
    stats: Path | None = None
    """Prune from such a file, without a forward pass. The output has the same bytes as the run that saved the file, if
    the configuration is the same."""
    format: str = DEFAULT_FORMAT
    """A name of :data:`ace_ext.formats.FORMATS`."""


@dataclass(frozen=True)
class RunRequest:
    """All arguments of ``run`` and ``plan``."""

    model: str
    config: PruneConfig
    calibration: Calibration
    options: RunOptions
    device: torch.device
    dtype: str = "auto"
    later: Calibration | None = None
    """The text that a later part of the run reads from the same source. Perplexity is not measured on it."""

    @property
    def writes_own_text(self) -> bool:
        """Whether the model writes its calibration text. The whole model must then be in memory."""
        return self.calibration.source == SELF and self.calibration.reads_text and self.options.stats is None

    @property
    def stored(self) -> list[int] | None:
        """Bytes of each block's statistics in the file of ``stats``; None without one."""
        return None if self.options.stats is None else stored_sizes(self.options.stats)

    @property
    def evaluates(self) -> bool:
        """Whether perplexity, or agreement with the dense model, is measured. A run from statistics has no forward
        pass."""
        return self.calibration.evaluate != EVALUATE_NEVER and self.options.stats is None

    def measures_bos(self, tokenizer: Tokenizer | None = None) -> bool:
        """Whether the model must be measured to choose if its samples begin with the BOS token. Without a tokenizer:
        whether it might have to be."""
        calibration = self.calibration
        if (
            calibration.bos != AUTO
            or calibration.source == SELF
            or not calibration.reads_text
            or self.options.stats is not None
        ):
            return False
        return tokenizer is None or settled_bos(calibration.bos, tokenizer) is None


def check_request(request: RunRequest) -> None:
    """Checks that the options can be combined.

    Raises:
        InputError: two options cannot; the message names them and says what to do.
    """
    config, options = request.config, request.options
    format_named(options.format).check(config)
    if options.offload not in OFFLOAD:
        raise InputError(f"offload must be one of {', '.join(OFFLOAD)} (got {options.offload!r})")
    if options.offload == "disk" and config.comparison.over_matrices:
        raise InputError(
            "offload disk loads one block at a time, and group model compares all; use group row or matrix"
        )
    if options.offload == "disk" and request.writes_own_text:
        raise InputError(
            "calibration self needs the whole model in memory to write text; with offload, give another text"
        )
    for stage in (config.method.train, config.method.distill):
        if stage is not None:
            _check_training(stage.name, options)
    if config.remove is not None:
        _check_removal(options)
        if config.remove.compares and request.calibration.nsamples < 2:
            raise InputError(
                "remove: params and score=auto compare candidates on samples that calibrate none of them; give "
                f"nsamples of at least 2 (got {request.calibration.nsamples})"
            )
    if config.only_removes and options.format != DEFAULT_FORMAT:
        raise InputError(
            f"format {options.format} stores zeros, and remove alone writes none; leave out format, or give sparsity "
            "or pattern"
        )
    if config.method.distill is not None and options.format != DEFAULT_FORMAT:
        raise InputError(
            f"distill writes format {DEFAULT_FORMAT} (got {options.format}); leave out format, then convert the output "
            f"by ace-prune pack OUTPUT --output PACKED --format {options.format}"
        )
    if options.save_stats and options.stats:
        raise InputError("give save-stats or stats, not both")
    if options.save_stats:
        check_replaceable("save-stats", options.save_stats, "file of --save-stats", is_statistics)


def _check_removal(options: RunOptions) -> None:
    reasons = {
        "offload disk": (options.offload == "disk", "the whole model must be in memory"),
        "stats": (options.stats is not None, "a file of statistics is of the dense model"),
        "save-stats": (options.save_stats is not None, "a file of statistics is of the dense model"),
        "torchrun": (launched(), "one process removes structures"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise InputError(f"remove does not go with {name}: {why}; leave out one of them")


def _check_training(stage: str, options: RunOptions) -> None:
    reasons = {
        "stats": (options.stats is not None, "a file of statistics holds no inputs to train on"),
        "save-stats": (
            options.save_stats is not None,
            "saved statistics are of dense blocks, and training changes blocks",
        ),
        "torchrun": (launched(), "one process trains"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise InputError(f"{stage} does not go with {name}: {why}; leave out one of them")
