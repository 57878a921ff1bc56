"""The text of a distillation: as many windows as its budget allows. By default it has the source and the choice about
the BOS token of the pruned folder's calibration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ace_ext.data.bos import BosChoice
from ace_ext.data.corpora import BUNDLED, SELF
from ace_ext.data.windows import CalibrationData
from ace_ext.errors import InputError
from ace_ext.models.loading import load_model
from ace_ext.models.whole_forward import whole_logits
from ace_ext.records import PruneReport
from ace_ext.runs.bos_choice import from_record
from ace_ext.runs.heal_models import running_dense
from ace_ext.runs.media import reader_of
from ace_ext.runs.memory_model import process_bytes
from ace_ext.runs.model_source import Source
from ace_ext.runs.options import Calibration, InputCalibration, RunRequest

NOTE = "text"
"""The key of the text's description in the notes of a journal."""


def recorded_text(report: PruneReport) -> Calibration:
    """The calibration that a report names, with defaults for what the report lacks."""
    return calibration_of(recorded_fields(report))


def recorded_fields(report: PruneReport) -> dict[str, Any]:
    """The fields of :class:`Calibration` that a report names."""
    recorded = report.extra.get("calibration", {})
    names = ("source", "nsamples", "seqlen", "seed", "text_field")
    found = {name: recorded[name] for name in names if name in recorded}
    bos = recorded.get("bos")
    return {**found, **({"bos": bos["mode"]} if isinstance(bos, dict) else {})}


def calibration_of(fields: Mapping[str, Any]) -> Calibration:
    """A calibration with these fields: of text, or of images or sound if its source is such a folder or file. One with
    a ``text_field`` is text."""
    reader = None if "text_field" in fields else reader_of(fields.get("source", BUNDLED))
    return Calibration(**fields) if reader is None else InputCalibration(**fields, reader=reader)


@dataclass(frozen=True)
class HealText:
    """Draws the windows of text, from all that they depend on.

    Args:
        text: the source, the tokens of a window, and the seed; ``nsamples`` is the number of windows.
        pruned: the pruned model.
        dense: opens the dense model.
        report: of the pruned folder.
    """

    text: Calibration
    pruned: Source
    dense: RunRequest
    report: PruneReport

    def draw(
        self, notes: dict[str, Any], progress: bool = False, tell: Callable[[str], None] | None = None
    ) -> CalibrationData:
        """Draws the windows. ``notes`` are those of the journal; a resumed run must draw the same windows. If the model
        writes them, ``tell`` is called with a line about it first, and ``progress`` shows a bar on stderr.

        Raises:
            InputError: the text cannot be read, is too short, or is not that of the run that is resumed.
        """
        data = self.text.load(self.pruned.tokenizer, self._writer(), self._bos(notes), progress, tell)
        found = self.text.describe(data)
        if notes.setdefault(NOTE, found) != found:
            raise InputError("resume: the text has changed since the run began; start over without --resume")
        return data

    def _bos(self, notes: dict[str, Any]) -> BosChoice:
        """Whether windows begin with the BOS token. If this run or the pruning run recorded a choice for the same mode
        and kind of text, it is used again. Otherwise the dense model decides."""
        known = notes.get(NOTE) or self.report.extra.get("calibration") or {}
        if (known.get("source") == SELF) == (self.text.source == SELF):
            choice = from_record(known, self.text.bos)
            if choice is not None:
                return choice
        return self.text.choose_bos(self.pruned.tokenizer, self.pruned.model, self._dense_logits)

    def _dense_logits(self, tokens: Tensor) -> Tensor:
        with running_dense(self.dense, self.pruned, self.report) as (model, blocks):
            return whole_logits(model, blocks, tokens, self.dense.device)

    def _writer(self) -> nn.Module | None:
        """The dense model in memory, if it writes the text; else None."""
        if self.text.source != SELF:
            return None
        size = sum(parameter.nbytes for parameter in self.pruned.model.parameters())
        limit = self.dense.options.max_memory
        if limit is not None and size + process_bytes(0, False, self.dense.device) > limit:
            raise InputError(
                f"calibration self needs the whole dense model, {size / 1e9:.2f} GB, in memory to write text; give "
                f"another --calibration, or raise --max-memory"
            )
        return load_model(self.dense.model, self.dense.dtype, self.dense.device).model
