"""A run whose method has the stage ``distill``. It prunes into a temporary folder, then distills that folder into the
output."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ace_ext.data.bos import NEVER
from ace_ext.data.corpora import CALIBRATION, SELF, source_sha256
from ace_ext.engine.distillation import distill_draw, heal_settings
from ace_ext.engine.progress import Progress
from ace_ext.errors import InputError
from ace_ext.fingerprint import arithmetic
from ace_ext.healing.batches import Batches
from ace_ext.healing.settings import HealSettings
from ace_ext.models.checksums import file_sha256
from ace_ext.models.versions import versions
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.bos_choice import from_record
from ace_ext.runs.command import run_command
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_memory import HealDemand
from ace_ext.runs.heal_models import whole_bytes
from ace_ext.runs.heal_request import HealOptions, HealRequest, LongerRun
from ace_ext.runs.holdout import HeldOutText, held_out_text
from ace_ext.runs.memory_model import Estimate, process_bytes
from ace_ext.runs.model_source import Source, budget_of, check_serves, open_source
from ace_ext.runs.options import Calibration, RunRequest
from ace_ext.runs.output import already_complete, finished_report, read_report
from ace_ext.runs.unfinished import UnfinishedRun, discard, first_part
from ace_ext.whole_files import write_whole

Prune = Callable[[RunRequest, Path, Progress], PruneReport]


def prune_and_heal(request: RunRequest, path: Path, progress: Progress, prune: Prune) -> PruneReport:
    """Prunes and distills. With ``options.resume`` an interrupted run continues, in either part.

    Args:
        request: the run; its method has ``distill``.
        path: the output folder.
        progress: the progress of both parts.
        prune: carries out the first part: it prunes a request without distillation into a folder.

    Raises:
        InputError: for an error in the arguments, the model, the text, or the disk.
    """
    request = replace(request, later=text_of(request))
    source = open_source(request, weights=False)
    check_serves(source, request)
    needed_memory(request, source)
    fingerprint, given = _fingerprint(request, source), request.options
    done = finished_report(path, fingerprint, given.overwrite) if given.resume else None
    runs = _TwoRuns(path, fingerprint, given.resume)
    try:
        if done is not None:
            runs.remove()
            discard(path)
            progress.note(already_complete(path))
            return done
        if not runs.model.is_dir():
            config, options = request.config.without_distillation(), replace(given, overwrite=False)
            first = replace(request, config=config, options=options)
            check_text(request, source)
            prune(first, runs.model, progress)
        if not runs.files:
            _record_config(runs.model, request)
        runs.check_pruned()
        second = _second(request, source, runs.model, path, fingerprint)
        report = heal_folder(second, progress.healing)[0]
        runs.remove()
        return report
    finally:
        if not runs.begun:
            runs.remove()
        runs.close()


def needed_memory(request: RunRequest, source: Source) -> Estimate:
    """The peak memory of the second part. ``source`` may be a skeleton.

    Raises:
        InputError: it is more than the run may use.
    """
    tokens, config = planned_batches(request)[1].tokens, request.config
    demand = HealDemand.of(source.model, source.blocks, tokens, whole_bytes(source), config.method.grid)
    return demand.divide(budget_of(request), process_bytes(0, False, request.device))[1]


def text_of(request: RunRequest, causal: bool = True) -> Calibration:
    """The text that a distillation reads: other windows of the calibration text. ``causal``: for a causal language
    model."""
    given = request.calibration
    nsamples, seed = distill_draw(request.config, given.seqlen, given.seed, causal)
    return replace(given, nsamples=nsamples, seed=seed)


def check_text(request: RunRequest, source: Source) -> None:
    """Draws the text of the second part once before the first, if this does not take the model.

    Raises:
        InputError: it is too short.
    """
    text = text_of(request)
    if SELF not in text.sources:
        tokens = replace(text, bos=NEVER).load(source.tokenizer, None).tokens
        Batches.of(tokens, heal_settings(request.config, *tokens.shape))


def planned_batches(request: RunRequest) -> tuple[HealSettings, Batches]:
    """The settings of the second part, and batches with the shape of its text but other tokens."""
    nsamples, seqlen = text_of(request).nsamples, request.calibration.seqlen
    settings = heal_settings(request.config, nsamples, seqlen)
    return settings, Batches.of(torch.arange(nsamples * seqlen).view(nsamples, seqlen), settings)


def _record_config(pruned: Path, request: RunRequest) -> None:
    """Writes the configuration and the command of both parts into the report."""
    report = read_report(pruned)
    report.config = request.config.to_dict()
    report.extra["command"] = run_command(request)
    write_whole(pruned / REPORT_NAME, report.to_json().encode("utf-8"))


class _TwoRuns(UnfinishedRun):
    """The folder of both parts, ``.NAME.pruned.unfinished/``. Once the first part is done, ``model/`` in it is the
    pruned model. The second part has its own folder, like any distillation.

    Args:
        output: the folder that the second part writes.
        fingerprint: everything that the output depends on, as plain values.
        resume: continue from what an earlier run left, if anything.

    Raises:
        InputError: another run uses the folder, or ``resume`` finds a run with other arguments.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        super().__init__(first_part(output), fingerprint)
        self.files: dict[str, str] = {}
        """Checksums of the pruned model's files by name; empty until it is complete."""
        self._open(resume)
        self._write_state({"files": self.files})

    def _has_state(self) -> bool:
        return (self.folder / "state.json").is_file()

    def _take_state(self, state: dict[str, Any]) -> None:
        self.files = dict(state["files"])

    def check_pruned(self) -> None:
        """Records checksums of the pruned model, or compares them with those of an earlier run.

        Raises:
            InputError: the model has changed.
        """
        found = {path.name: file_sha256(path) for path in sorted(self.model.iterdir()) if path.is_file()}
        for name in sorted({*found, *self.files}) if self.files else ():
            if found.get(name) != self.files.get(name):
                raise InputError(
                    f"resume: {self.model / name} has changed since the run wrote it (its checksum differs); start "
                    "over without --resume"
                )
        self.files = found
        self._write_state({"files": found})

    @property
    def begun(self) -> bool:
        """Whether a part has written anything."""
        return self.folder.is_dir() and any(path.is_dir() for path in self.folder.iterdir())


def _fingerprint(request: RunRequest, source: Source) -> dict[str, Any]:
    """Everything that the output depends on, as plain values. The first part has its own fingerprint too."""
    text = request.calibration
    return {
        "versions": versions(),
        "model": source.files.described,
        "calibration": {**asdict(text), "sha256": source_sha256(text.source, CALIBRATION, text.text_field)},
        "config": request.config.to_dict(),
        "dtype": request.dtype,
        "device": request.device.type,
        **arithmetic(),
    }


def _held_out(request: RunRequest, source: Source, pruned: Path) -> HeldOutText | None:
    """The text on which the first part measured perplexity."""
    report = read_report(pruned)
    bos = from_record(report.extra.get("calibration"), request.calibration.bos)
    return None if report.perplexity is None or bos is None else held_out_text(request, source, bos)


def _second(request: RunRequest, source: Source, pruned: Path, path: Path, fingerprint: dict[str, Any]) -> HealRequest:
    """The second part."""
    given, text = request.options, text_of(request)
    options = HealOptions(
        windows=text.nsamples,
        overwrite=given.overwrite,
        resume=given.resume,
        max_memory=given.max_memory,
        longer=LongerRun(fingerprint, _held_out(request, source, pruned)),
    )
    settings = heal_settings(request.config, text.nsamples, text.seqlen)
    return HealRequest(str(pruned), path, text, request.model, settings, options, request.device)
