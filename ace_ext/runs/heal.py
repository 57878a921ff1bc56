"""``ace-prune heal``: distils a pruned folder from its dense model into a new folder, within a memory budget. An
interrupted run can be resumed."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ace_ext.data.requests import check_positions, check_predicts
from ace_ext.data.requests import check_request as check_numbers
from ace_ext.data.windows import CalibrationData
from ace_ext.errors import InputError
from ace_ext.formats import grid_of
from ace_ext.grids import Grid
from ace_ext.healing.batches import Batches, Placement, windows_within
from ace_ext.healing.context import HealContext
from ace_ext.healing.distill import distill_, steps_of
from ace_ext.healing.protocols import Observer
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.teacher import NAME, earlier_states, teacher_states
from ace_ext.models._transformers import predicts_tokens
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.safetensors_files import Shards
from ace_ext.process_memory import return_freed_memory
from ace_ext.records import Healing, PruneReport
from ace_ext.runs.heal_journal import HealJournal
from ace_ext.runs.heal_memory import Division, HealDemand
from ace_ext.runs.heal_models import HealedBlocks, dense_name, dense_request, open_pruned, running_dense, whole_bytes
from ace_ext.runs.heal_request import TOKENS, HealRequest
from ace_ext.runs.heal_run import HealRun, open_writer
from ace_ext.runs.heal_text import HealText
from ace_ext.runs.heal_trial import tokens_within
from ace_ext.runs.holdout import logits_of_folder
from ace_ext.runs.memory_model import Estimate, process_bytes
from ace_ext.runs.model_source import Source, budget_of
from ace_ext.runs.options import RunRequest
from ace_ext.runs.output import (
    check_apart,
    check_output,
    disk_errors,
    output_path,
    read_report,
)
from ace_ext.runs.unfinished import recover


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
        check_apart(path, request.folder, name, *request.text.sources)
        recover(path)
        check_output(path, request.options.overwrite, request.options.resume)
        request.text.check()
        dense = dense_request(name, request, report)
        pruned = open_pruned(request, report)
        if predicts_tokens(pruned.model):
            return _CausalRun(request, report, dense, pruned).run(path, observer, tell), path
        from ace_ext.runs.heal_network import NetworkRun  # imported here: few runs need it

        return NetworkRun(request, report, dense, pruned).run(path, observer, tell), path


class _CausalRun(HealRun):
    """The run of a causal language model: one block at a time is read from the files."""

    def __init__(self, request: HealRequest, report: PruneReport, dense: RunRequest, pruned: Source) -> None:
        super().__init__(request, report, dense, pruned)
        if not request.text.reads_text:
            raise InputError(
                f"calibration {request.text.source} has images or sound, and this model is healed on text: give "
                "--calibration with one"
            )
        check_predicts(pruned.model, "healing trains on its predictions: train it on its own task")

    def _began(self, journal: HealJournal) -> bool:
        return NAME in journal.notes

    def _train(self, journal: HealJournal, observer: Observer, tell: Callable[[str], None] | None) -> Healing:
        data = self._text(journal, observer.shown, tell)
        batches = Batches.of(data.tokens, self._request.settings)
        division, need = self._divide(journal, batches)
        if tell is not None:
            tell(_plan(batches, self._request.settings, division, need))
        open_writer(journal, self._pruned)
        place = Placement(journal.folder, division.states, self._request.device)
        context = HealContext(place=place, journal=journal, observer=observer)
        states = self._teacher(batches, context)
        shards = Shards(journal.model).adopt(self._pruned.model)  # blocks that are trained already are read from there
        blocks = HealedBlocks(self._pruned, shards, journal.trained, self._request.device)
        divided = replace(
            context, blocks=blocks, parts=division.parts, resident=division.resident, graphs=division.graphs
        )
        return distill_(
            self._pruned.model, states, data.tokens, self._request.settings, grid=self._grid, context=divided
        )

    @cached_property
    def _grid(self) -> Grid | None:
        """The grid of the pruned matrices; None if the run did not quantize."""
        return grid_of(self._report)

    def _text(self, journal: HealJournal, progress: bool, tell: Callable[[str], None] | None) -> CalibrationData:
        """Draws as many windows of text as the budget allows. A resumed run draws the same."""
        notes, options, settings = journal.notes, self._request.options, self._request.settings
        seqlen, tokens = self._request.text.seqlen, options.tokens or TOKENS
        if "nsamples" not in notes:
            if options.minutes is not None:
                tokens = tokens_within(60 * options.minutes, self._pruned, settings, seqlen, self._request.device)
            notes["nsamples"] = options.windows or windows_within(tokens, seqlen, settings)
        text = replace(self._request.text, nsamples=notes["nsamples"])
        check_numbers(text.nsamples, text.seqlen, text.seed)
        check_positions(self._pruned.model, text.seqlen)
        return HealText(text, self._pruned, self._dense, self._report).draw(notes, progress, tell)

    def _divide(self, journal: HealJournal, batches: Batches) -> tuple[Division, Estimate]:
        """Decides what is in memory together. A resumed run trains as many blocks together as before."""
        request, pruned = self._request, self._pruned
        whole = whole_bytes(self._skeleton)
        demand = HealDemand.of(pruned.model, pruned.blocks, batches.tokens, whole, self._grid)
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
        with running_dense(self._dense, self._pruned, self._report) as (model, blocks):
            return teacher_states(model, blocks, batches.tokens, context.place, journal, context.observer)

    def _measure(self, journal: HealJournal, tell: Callable[[str], None] | None) -> None:
        """Adds the perplexity of the written model to those of the dense and the pruned model."""
        longer, found = self._request.options.longer, self._report.perplexity
        text = None if longer is None else longer.held_out
        if text is None or found is None:
            self._report.perplexity = None  # it would not be that of the written model
        else:
            found.healed = text.measure(logits_of_folder(self._pruned, journal.model, self._request.device))


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
