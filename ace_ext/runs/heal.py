"""``ace-prune heal``: distils a pruned folder from its dense model into a new folder, within a memory budget. An
interrupted run can be resumed."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ace_ext.data.corpora import texts_of
from ace_ext.data.requests import check_positions
from ace_ext.data.requests import check_request as check_numbers
from ace_ext.data.windows import CalibrationData
from ace_ext.errors import InputError
from ace_ext.formats import DEFAULT_FORMAT, format_named, grid_of
from ace_ext.grids import Grid
from ace_ext.healing.batches import Batches, Placement, windows_needed
from ace_ext.healing.context import HealContext
from ace_ext.healing.distill import distill_, steps_of
from ace_ext.healing.progress import HealProgress
from ace_ext.healing.protocols import Observer
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.teacher import NAME, earlier_states, teacher_states
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.versions import versions
from ace_ext.process_memory import peak_memory_bytes, return_freed_memory
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.command import heal_command
from ace_ext.runs.heal_journal import HealJournal
from ace_ext.runs.heal_memory import Division, HealDemand
from ace_ext.runs.heal_models import HealedBlocks, dense_name, dense_request, open_pruned, running_dense, whole_bytes
from ace_ext.runs.heal_request import TOKENS, HealRequest
from ace_ext.runs.heal_text import NOTE, HealText, recorded_text
from ace_ext.runs.heal_trial import tokens_within
from ace_ext.runs.holdout import logits_of_folder
from ace_ext.runs.memory_model import Estimate, process_bytes
from ace_ext.runs.model_source import Source, budget_of, open_source
from ace_ext.runs.options import RunRequest
from ace_ext.runs.output import (
    already_complete,
    check_apart,
    check_output,
    disk_errors,
    finished_report,
    output_path,
    read_report,
)
from ace_ext.runs.unfinished import discard, recover
from ace_ext.runs.verify import verify_weights


def heal_folder(
    request: HealRequest, observer: Observer | None = None, tell: Callable[[str], None] | None = None
) -> tuple[PruneReport, Path]:
    """Distils a pruned folder from its dense model into a new folder; neither input is changed.

    The state of the run is on the disk at intervals. With ``options.resume`` an interrupted run continues from there,
    and its output has the same bytes as an uninterrupted one.

    Args:
        request: what to do.
        observer: what is shown while it runs; default: nothing.
        tell: called with lines for the user before the work: how much text, how much memory.

    Returns:
        The pruned folder's report with ``healing``, and the folder that was written.

    Raises:
        InputError: for an error in the arguments, the models, the text, or the disk; too little memory; or weights in
            the pruned folder that do not match its report (:func:`ace_ext.runs.verify.verify_weights`).
    """
    request.options.check()
    if request.options.max_memory is not None and request.device.type == "cpu":
        return_freed_memory()
    path = output_path(request.output)
    report = read_report(request.folder)
    name = dense_name(request.dense, report)
    with disk_errors(path):
        check_apart(path, request.folder, name, *(part.source for part in texts_of(request.text.source)))
        recover(path)
        check_output(path, request.options.overwrite, request.options.resume)
        request.text.check()
        dense = dense_request(name, report, request.device, request.options.max_memory)
        return _Run(request, report, dense).run(path, observer, tell), path


class _Run:
    """One run, up to its report."""

    def __init__(self, request: HealRequest, report: PruneReport, dense: RunRequest) -> None:
        self._request, self._report, self._dense = request, report, dense
        self._pruned = open_pruned(request.folder, report, request.device)

    def run(self, path: Path, observer: Observer | None, tell: Callable[[str], None] | None) -> PruneReport:
        """The whole run; ``path``: the output."""
        options = self._request.options
        fingerprint = options.longer.fingerprint if options.longer else self._fingerprint()
        done = finished_report(path, fingerprint, options.overwrite) if options.resume else None
        if done is not None:
            discard(path)
            if tell is not None:
                tell(already_complete(path))
            return done
        if options.longer is None:  # such a run checks its own folder
            _check_weights(self._request.folder)
        journal = HealJournal(path, fingerprint, options.resume)
        try:
            check_output(path, options.overwrite, options.resume)  # a run that had the lock before may have written it
            observer = observer or HealProgress()
            data = self._text(journal, observer.shown, tell)
            batches = Batches.of(data.tokens, self._request.settings)
            division, need = self._divide(journal, batches)
            if tell is not None:
                tell(_plan(batches, self._request.settings, division, need))
            _open_writer(journal, self._pruned)
            place = Placement(journal.folder, division.states, self._request.device)
            context = HealContext(place=place, journal=journal, observer=observer)
            states = self._teacher(batches, context)
            self._report.healing = distill_(
                self._pruned.model,
                states,
                data.tokens,
                self._request.settings,
                grid=self._grid,
                context=replace(
                    context,
                    blocks=HealedBlocks(
                        self._pruned, _shards(journal, self._pruned), journal.trained, self._request.device
                    ),
                    parts=division.parts,
                    resident=division.resident,
                    graphs=division.graphs,
                ),
            )
            self._report.extra["healing"] = self._extra(journal)
            self._measure(journal)
            check_output(path, self._request.options.overwrite)  # another program may have written there meanwhile
            journal.finish(self._report, REPORT_NAME)
            return self._report
        except Exception:
            if NAME not in journal.notes:  # nothing to resume from
                journal.remove()
            raise
        finally:
            journal.close()

    @cached_property
    def _grid(self) -> Grid | None:
        """The grid of the pruned matrices; None if the run did not quantize."""
        return grid_of(self._report)

    @cached_property
    def _skeleton(self) -> Source:
        """The dense model without its weights."""
        return open_source(self._dense, weights=False)

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the output depends on, as plain values."""
        text, options = asdict(self._request.text), self._request.options
        del text["nsamples"], text["evaluate"]
        return {
            "versions": versions(),
            "pruned": self._pruned.files.described,
            "dense": self._skeleton.files.described,
            "settings": asdict(self._request.settings),
            "budget": {"tokens": options.tokens, "minutes": options.minutes, "windows": options.windows},
            "text": text,
            "device": self._request.device.type,
            "threads": torch.get_num_threads(),
        }

    def _text(self, journal: HealJournal, progress: bool, tell: Callable[[str], None] | None) -> CalibrationData:
        """Draws as many windows of text as the budget allows. A resumed run draws the same."""
        notes, options, settings = journal.notes, self._request.options, self._request.settings
        seqlen, tokens = self._request.text.seqlen, options.tokens or TOKENS
        if "nsamples" not in notes:
            if options.minutes is not None:
                tokens = tokens_within(60 * options.minutes, self._pruned, settings, seqlen, self._request.device)
            notes["nsamples"] = options.windows or windows_needed(tokens, seqlen, settings)
        text = replace(self._request.text, nsamples=notes["nsamples"])
        check_numbers(text.nsamples, text.seqlen, text.seed)
        check_positions(self._pruned.model, text.seqlen)
        return HealText(text, self._pruned, self._dense, self._report).draw(notes, progress, tell)

    def _divide(self, journal: HealJournal, batches: Batches) -> tuple[Division, Estimate]:
        """Decides what is in memory together. A resumed run trains as many blocks together as before."""
        request, pruned = self._request, self._pruned
        kept = 1 - self._report.sparsity
        whole = whole_bytes(self._skeleton)
        demand = HealDemand.of(pruned.model, pruned.blocks, kept, batches.tokens, whole, self._grid)
        division, need = demand.divide(
            budget_of(self._dense),
            process_bytes(0, False, request.device),
            journal.notes.get("parts"),
        )
        journal.notes["parts"] = division.parts
        return division, need

    def _teacher(self, batches: Batches, context: HealContext) -> HiddenStates:
        """The dense model's states. If the earlier run computed all of them, they are used again."""
        journal = context.journal
        known = earlier_states(context.place, journal)
        if known is not None and journal.notes[NAME] == len(self._skeleton.blocks):
            return known
        with running_dense(self._dense, self._pruned, bool(self._report.removed)) as (model, blocks):
            return teacher_states(model, blocks, batches.tokens, context.place, journal, context.observer)

    def _measure(self, journal: HealJournal) -> None:
        """Adds the perplexity of the written model to those of the dense and the pruned model."""
        longer, found = self._request.options.longer, self._report.perplexity
        text = None if longer is None else longer.held_out
        if text is None or found is None:
            self._report.perplexity = None  # it would not be that of the written model
        else:
            found.healed = text.measure(logits_of_folder(self._pruned, journal.model, self._request.device))

    def _extra(self, journal: HealJournal) -> dict[str, Any]:
        given, options = self._request, self._request.options
        command = heal_command(given.text, recorded_text(self._report), given.settings, options.tokens, options.minutes)
        return {
            "dense": self._dense.model,
            "command": None if options.longer else command,
            "calibration": journal.notes[NOTE],
            "peak_memory_bytes": peak_memory_bytes(self._request.device),
            "device": str(self._request.device),
            "versions": versions(),
        }


def _check_weights(folder: str) -> None:
    """Raises InputError if the weights of a pruned folder do not match its report: the output's report repeats it."""
    problems = verify_weights(folder).problems
    if problems:
        more = f" (and {len(problems) - 1} more, see ace-prune verify)" if len(problems) > 1 else ""
        raise InputError(
            f"folder {folder!r} has changed since ace-prune wrote it: {problems[0]}{more}; prune the dense model again"
        )


def _open_writer(journal: HealJournal, pruned: Source) -> None:
    """Opens the output's writer. Copies the pruned folder, unless an earlier run did; then its output is checked."""
    journal.model.mkdir(parents=True, exist_ok=True)
    journal.writer = format_named(DEFAULT_FORMAT).open(journal.model)
    if not journal.notes.get("laid_out"):
        journal.writer.lay_out(pruned.dense)
    journal.writer.check(pruned.dense)
    journal.check_output(pruned.blocks)


def _shards(journal: HealJournal, pruned: Source) -> Shards:
    """The output's files. Blocks that are trained already are read from them."""
    return Shards(journal.model).adopt(pruned.model)


def _plan(batches: Batches, settings: HealSettings, division: Division, need: Estimate) -> str:
    """One line about what a run will do."""
    trained = sum(batches.tokens[i].numel() for i in batches.trained)
    together = (
        "all blocks together" if division.parts == 1 else f"blocks in {division.parts} windows, one after another"
    )
    return (
        f"{settings.passes} x {trained:,} tokens in {steps_of(batches, settings)} steps, {together}; "
        f"needs about {need.total / 1e9:.2f} GB: {need.describe()}"
    )
