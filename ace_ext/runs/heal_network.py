"""``ace-prune heal`` of a network that is no causal language model: the dense and the pruned model are in memory
together."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ace_ext.data.bos import BosChoice
from ace_ext.data.corpora import SELF
from ace_ext.data.requests import sample_count
from ace_ext.engine.inputs import model_inputs, text_inputs
from ace_ext.errors import InputError
from ace_ext.formats import grid_of
from ace_ext.healing.batches import windows_within
from ace_ext.healing.context import HealContext
from ace_ext.healing.networks import NetworkDistillation
from ace_ext.healing.protocols import Observer
from ace_ext.records import Healing, PruneReport
from ace_ext.runs.heal_journal import HealJournal
from ace_ext.runs.heal_models import check_same_network, config_of
from ace_ext.runs.heal_request import TOKENS, HealRequest
from ace_ext.runs.heal_run import HealRun, open_writer
from ace_ext.runs.heal_text import NOTE, HealText, recorded_text
from ace_ext.runs.model_source import Source, open_source
from ace_ext.runs.network_holdout import network_measurement_for
from ace_ext.runs.options import EVALUATE_AUTO, InputCalibration, RunRequest


class NetworkRun(HealRun):
    """The run of a network. Text is drawn as for causal language models. Of images and sound the calibration's samples
    are taken, so ``passes`` says how much is trained on.

    Raises:
        InputError: an option that such a run does not read, or a network without some of its structures.
    """

    def __init__(self, request: HealRequest, report: PruneReport, dense: RunRequest, pruned: Source) -> None:
        super().__init__(request, report, dense, pruned)
        options, text = request.options, request.text
        refused = {
            "minutes": (options.minutes is not None, "its steps are not timed; give tokens, or passes"),
            "max-memory": (options.max_memory is not None, "both models must be in memory; leave it out"),
            "tokens": (
                options.tokens is not None and not text.reads_text,
                f"{text.source} has images or sound, whose samples are all taken; give passes",
            ),
            "calibration self": (text.source == SELF, "this model writes no text; give another one"),
        }
        for name, (given, why) in refused.items():
            if given:
                raise InputError(f"{name} does not go with {type(pruned.model).__name__}: {why}")
        if report.removed:
            raise InputError(
                f"folder {request.folder!r}: structures were removed from {type(pruned.model).__name__}; after a "
                "removal only models that predict the next token are healed"
            )

    def _described_text(self) -> dict[str, Any]:
        text = self._request.text
        return super()._described_text() if text.reads_text else {"source": text.source, "nsamples": text.nsamples}

    def _began(self, journal: HealJournal) -> bool:
        return bool(journal.notes.get("saved") or journal.notes.get("part"))

    def _train(self, journal: HealJournal, observer: Observer, tell: Callable[[str], None] | None) -> Healing:
        request, settings = self._request, self._request.settings
        batches = self._inputs(journal, observer.shown, tell)
        pruned = open_source(replace(self._dense, model=request.folder))
        check_same_network(self._whole, self._pruned, self._report)
        distillation = NetworkDistillation(
            pruned.model,
            pruned.blocks,
            batches,
            lambda tokens: settings,
            grid_of(self._report),
            HealContext(journal=journal, observer=observer),
            teacher=self._whole.model,
        )
        if tell is not None:
            tell(f"{settings.passes} x {sample_count(batches)} samples in {distillation.steps} steps")
        open_writer(journal, pruned)
        return distillation.train_()

    @cached_property
    def _whole(self) -> Source:
        """The dense model with its weights."""
        return open_source(self._dense)

    def _inputs(
        self, journal: HealJournal, progress: bool, tell: Callable[[str], None] | None
    ) -> list[dict[str, Tensor]]:
        """Arguments of the model's calls. A resumed run must have the same."""
        request, pruned, config = self._request, self._pruned, config_of(self._report)
        if isinstance(request.text, InputCalibration):
            read = request.text.read(pruned.files.folder)
            found = request.text.describe_inputs(read)
            if journal.notes.setdefault(NOTE, found) != found:
                raise InputError("resume: the samples have changed since the run began; start over without --resume")
            return list(model_inputs(pruned.model, read, config, request.device))
        windows = windows_within(request.options.tokens or TOKENS, request.text.seqlen, request.settings)
        text = replace(request.text, nsamples=windows)
        drawn = HealText(text, pruned, self._dense, self._report).draw(journal.notes, progress, tell)
        return list(model_inputs(pruned.model, text_inputs(pruned.model, drawn.tokens, config), config, request.device))

    def _measure(self, journal: HealJournal, tell: Callable[[str], None] | None) -> None:
        """Measures the agreement of the written model with the dense one."""
        self._report.agreement = None  # it would be that of the pruned model
        found, tell = journal.notes[NOTE], tell or (lambda line: None)
        recorded = replace(recorded_text(self._report), evaluate=EVALUATE_AUTO)
        read = replace(self._request.text, nsamples=found["nsamples"])
        if not recorded.reads_text and read.source == recorded.source and read.seed != recorded.seed:
            tell(
                "agreement with the dense model is not measured: another seed than the calibration's may have drawn "
                "the samples that it leaves"
            )
            return
        bos = BosChoice(**found["bos"]) if recorded.reads_text else None
        measured = network_measurement_for(
            replace(self._dense, calibration=recorded, later=read), self._whole, bos, tell
        )
        if measured is not None:
            measured.before()
            measured.after(self._report, journal.model)
