"""What a distillation of a pruned folder does for all kinds of models: its checks, its journal and its report."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ace_ext.data.corpora import CALIBRATION, source_sha256
from ace_ext.fingerprint import arithmetic
from ace_ext.formats import DEFAULT_FORMAT, format_named
from ace_ext.healing.progress import HealProgress
from ace_ext.healing.protocols import Observer
from ace_ext.models.versions import versions
from ace_ext.process_memory import peak_memory_bytes
from ace_ext.records import REPORT_NAME, Healing, PruneReport
from ace_ext.runs.command import heal_command
from ace_ext.runs.heal_journal import HealJournal
from ace_ext.runs.heal_request import HealRequest
from ace_ext.runs.heal_text import NOTE, recorded_text
from ace_ext.runs.model_source import Source, open_source
from ace_ext.runs.options import RunRequest
from ace_ext.runs.output import already_complete, check_output, finished_report
from ace_ext.runs.unfinished import discard
from ace_ext.runs.verify import check_unchanged


class HealRun:
    """One run, up to its report: what is the same for all kinds of models.

    Args:
        request: what to do.
        report: of the pruned folder; the run completes it.
        dense: opens the dense model.
        pruned: the skeleton of the pruned model.

    Raises:
        InputError: the request does not fit the kind of model.
    """

    def __init__(self, request: HealRequest, report: PruneReport, dense: RunRequest, pruned: Source) -> None:
        self._request, self._report, self._dense, self._pruned = request, report, dense, pruned

    def _began(self, journal: HealJournal) -> bool:
        """Whether there is anything to resume from."""
        raise NotImplementedError

    def _train(self, journal: HealJournal, observer: Observer, tell: Callable[[str], None] | None) -> Healing:
        """Trains the model and writes its blocks."""
        raise NotImplementedError

    def _measure(self, journal: HealJournal, tell: Callable[[str], None] | None) -> None:
        """Adds what the written model is measured by to the report."""
        raise NotImplementedError

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
            check_unchanged(self._request.folder)
        journal = HealJournal(path, fingerprint, options.resume)
        try:
            check_output(path, options.overwrite, options.resume)  # a run that had the lock before may have written it
            observer = observer or HealProgress()
            self._report.healing = self._train(journal, observer, tell)
            self._report.extra["healing"] = self._extra(journal)
            self._measure(journal, tell)
            check_output(path, self._request.options.overwrite)  # another program may have written there meanwhile
            journal.finish(self._report, REPORT_NAME)
            return self._report
        except Exception:
            if not self._began(journal):  # nothing to resume from
                journal.remove()
            raise
        finally:
            journal.close()

    @cached_property
    def _skeleton(self) -> Source:
        """The dense model without its weights."""
        return open_source(self._dense, weights=False)

    def _fingerprint(self) -> dict[str, Any]:
        """Everything that the output depends on, as plain values."""
        options, text = self._request.options, self._request.text
        return {
            "versions": versions(),
            "pruned": self._pruned.files.described,
            "dense": self._skeleton.files.described,
            "settings": asdict(self._request.settings),
            "budget": {"tokens": options.tokens, "minutes": options.minutes, "windows": options.windows},
            "text": {**self._described_text(), "sha256": source_sha256(text.source, CALIBRATION, text.text_field)},
            "device": self._request.device.type,
            **arithmetic(),
        }

    def _described_text(self) -> dict[str, Any]:
        """What the text depends on, for the fingerprint."""
        text = asdict(self._request.text)
        del text["nsamples"], text["evaluate"]
        return text

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


def open_writer(journal: HealJournal, pruned: Source) -> None:
    """Opens the output's writer. Copies the pruned folder, unless an earlier run did; then its output is checked."""
    journal.model.mkdir(parents=True, exist_ok=True)
    journal.writer = format_named(DEFAULT_FORMAT).open(journal.model)
    if not journal.notes.get("laid_out"):
        journal.writer.lay_out(pruned.dense)
    journal.writer.check(pruned.dense)
    journal.check_output(pruned.blocks)
