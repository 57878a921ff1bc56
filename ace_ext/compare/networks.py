"""The runs of a comparison on a network that is no causal language model. Each is measured by its agreement with the
dense model, on held-out text, images or sound."""

from ace_ext.compare.bench import Bench, Drawn
from ace_ext.compare.journal import Cell
from ace_ext.data.corpora import SELF
from ace_ext.data.held_out_inputs import (
    BATCH,
    HeldOutInputs,
    compare,
    measure,
    media_samples,
    text_samples,
    text_windows,
)
from ace_ext.data.media_items import is_media
from ace_ext.data.perplexity import Perplexity
from ace_ext.data.tasks import TaskScore
from ace_ext.data.windows import evaluation_tokens
from ace_ext.engine.inputs import text_inputs
from ace_ext.errors import InputError
from ace_ext.fingerprint import inputs_sha256
from ace_ext.models._transformers import main_input
from ace_ext.pruning.config import PruneConfig


class NetworkBench(Bench):
    """The runs of one such network; see :class:`ace_ext.compare.bench.Bench`. Its scores are figures of agreement, by
    their names and texts."""

    def read_(self) -> None:
        """Reads what is evaluated on, and measures the dense model there."""
        self._read: tuple[object, Drawn] | None = None  # the last samples that are no text
        if self.evaluation.tasks.names:
            raise InputError(
                f"tasks are for models that predict the next token (got {self.loaded.source!r}); leave out tasks"
            )
        self.inputs = {source: self._held_out(source) for source in self.evaluation.texts}
        self.answers = {source: measure(self.model, inputs) for source, inputs in self.inputs.items()}

    def _held_out(self, source: str) -> HeldOutInputs:
        if is_media(source):
            return media_samples(source, self.loaded.source, self.model, self.evaluation.windows)
        self._check_reads_text(source)
        ids = evaluation_tokens(source, self.loaded.tokenizer, text_field=self.text_field)
        seqlen, most = self.evaluation.seqlen, self.evaluation.windows
        windows = text_windows(self.model, ids, self.bos.token, seqlen, most, ("texts", source))
        return HeldOutInputs(source, text_samples(self.model, windows))

    def _check_reads_text(self, source: str) -> None:
        main = main_input(self.model)
        if main != "input_ids":
            raise InputError(
                f"{source} is text, and {self.loaded.source!r} reads {main}; give images or sound as calibration and "
                "texts"
            )

    def calibration(self, cell: Cell, config: PruneConfig, bos: str) -> Drawn:
        """As :meth:`Bench.calibration`. What is no text is also what a method that distils trains on."""
        if is_media(cell.calibration):
            folder = self.loaded.source
            wanted = cell.calibration, cell.nsamples, cell.seed
            if self._read is None or self._read[0] != wanted:  # cells with the same samples follow one another
                found = media_samples(cell.calibration, folder, self.model, cell.nsamples, cell.seed, batch=BATCH)
                batches = list(found.batches)
                self._read = wanted, Drawn(batches, inputs_sha256(batches), None)
            return self._read[1]
        self._check_reads_text(cell.calibration)
        if cell.calibration == SELF:
            raise InputError(
                f"calibration {SELF} needs a model that writes text (got {self.loaded.source!r}); give a text"
            )
        data, text = self.windows(cell, config, bos)
        again = None if text is None else text_inputs(self.model, text, config)
        return Drawn(text_inputs(self.model, data.tokens, config), data.sha256, data.bos, again)

    def evaluate(self) -> dict[str, Perplexity]:
        """Nothing: the model predicts no next token."""
        return {}

    def scores(self) -> dict[str, TaskScore]:
        """The figures of agreement of the model as it is now, by text and name."""
        found = {}
        for source, inputs in self.inputs.items():
            agreement = compare(self.answers[source], measure(self.model, inputs), inputs)
            for name, value in agreement.figures.items():
                found[f"{source}: {name}"] = TaskScore(name, value, agreement.samples)
        return found
