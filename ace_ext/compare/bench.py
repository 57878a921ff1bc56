"""The runs of a comparison on one loaded language model.

The dense weights are restored before each run. Runs may share calibration samples but no statistics: from the second
block on, statistics depend on the pruned blocks before (except with the group ``model``).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ace_ext.compare.grid import Evaluation
from ace_ext.compare.journal import BlockFigures, Cell, Run
from ace_ext.data.bos import BosChoice, choose_bos
from ace_ext.data.corpora import SELF
from ace_ext.data.perplexity import Perplexity, perplexity
from ace_ext.data.tasks import TaskScore
from ace_ext.data.windows import CalibrationData, evaluation_tokens, load_windows
from ace_ext.engine.api import prune_model
from ace_ext.engine.distillation import distill_draw
from ace_ext.engine.inputs import Batches
from ace_ext.models._transformers import predicts_tokens
from ace_ext.models.loading import LoadedModel
from ace_ext.process_memory import reset_peak
from ace_ext.pruning.config import PruneConfig

_VALUES_HASHED = 4096  # of each parameter: enough to tell fine-tuned or pruned weights apart, and fast


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a run is calibrated on."""

    batches: Batches
    sha256: str
    bos: BosChoice | None
    """How samples of text begin."""
    distill_text: Batches | None = None
    """What a method that distils trains on."""


KEPT = 2
"""The number of texts to keep in memory: the samples of a cell, and the text of its distillation."""


class Bench:
    """The runs of one model. It holds the model, a CPU copy of its dense weights, the evaluation tokens by text, the
    last texts, and the choices of the BOS token. Choices in ``recorded`` are used again."""

    def __init__(
        self, loaded: LoadedModel, evaluation: Evaluation, text_field: str, recorded: Iterable[BosChoice] = ()
    ) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.evaluation, self.text_field = evaluation, text_field
        self.device = next(self.model.parameters()).device
        self.dense = {name: _cpu_copy(value) for name, value in self.model.named_parameters()}
        self._choices = {choice.mode: choice for choice in recorded}
        self.bos = self._choose(evaluation.bos)
        """Whether evaluation windows begin with the BOS token."""
        self._drawn: dict[Cell, dict[str, CalibrationData]] = {}
        self.read_()

    def read_(self) -> None:
        """Reads what is evaluated on."""
        self.texts = {
            text: evaluation_tokens(text, self.loaded.tokenizer, text_field=self.text_field)
            for text in self.evaluation.texts
        }

    def run(self, cell: Cell, config: PruneConfig, bos: str, source_sha256: str | None) -> Run:
        """Restores the dense weights, prunes and evaluates. ``bos``: the mode for the calibration samples."""
        restore(self.model, self.dense)
        drawn = self.calibration(cell, config, bos)
        own_peak = reset_peak(self.device)
        report = prune_model(self.model, drawn.batches, config, distill_text=drawn.distill_text)
        return Run(
            cell=cell,
            config=report.config,
            source_sha256=source_sha256,
            tokens_sha256=drawn.sha256,
            dtype=report.dtype,
            sparsity=report.sparsity,
            seconds=report.seconds,
            peak_memory_bytes=report.peak_memory_bytes,
            own_peak=own_peak,
            perplexity=self.evaluate(),
            blocks=[BlockFigures.of(block) for block in report.blocks],
            bos=drawn.bos,
            tasks=self.scores(),
        )

    def calibration(self, cell: Cell, config: PruneConfig, bos: str) -> Drawn:
        """What a cell is calibrated on. Call it while the model is dense."""
        data, text = self.windows(cell, config, bos)
        return Drawn(data.tokens, data.sha256, data.bos, text)

    def windows(self, cell: Cell, config: PruneConfig, bos: str) -> tuple[CalibrationData, Tensor | None]:
        """The samples of text of a cell; and what its method trains on, if it distils."""
        data = self._draw(cell, bos)
        if config.method.distill is None:
            return data, None
        nsamples, seed = distill_draw(config, cell.seqlen, cell.seed, predicts_tokens(self.model))
        return data, self._draw(replace(cell, nsamples=nsamples, seed=seed), bos).tokens

    def evaluate(self) -> dict[str, Perplexity]:
        """Perplexity of the model as it is now, by text."""
        seqlen = self.evaluation.seqlen
        size = seqlen * self.evaluation.windows
        token = self.bos.token
        return {text: perplexity(self.model, tokens, seqlen, size, bos=token) for text, tokens in self.texts.items()}

    def scores(self) -> dict[str, TaskScore]:
        """Scores of the model as it is now, by task."""
        return self.evaluation.tasks.scores(self.model, self.loaded.tokenizer)

    def _choose(self, mode: str) -> BosChoice:
        """The choice for text that the model did not write. Call it while the model is dense."""
        if mode not in self._choices:
            self._choices[mode] = choose_bos(mode, self.loaded.tokenizer, self.model)
        return self._choices[mode]

    def _draw(self, cell: Cell, bos: str) -> CalibrationData:
        """The samples of a cell. Call it while the model is dense: with the source ``self`` the model writes them."""
        wanted = replace(cell, method="", amount="")
        if wanted not in self._drawn and len(self._drawn) == KEPT:
            del self._drawn[next(iter(self._drawn))]
        drawn = self._drawn.setdefault(wanted, {})
        if bos not in drawn:
            drawn[bos] = load_windows(
                cell.calibration,
                self.loaded.tokenizer,
                cell.nsamples,
                cell.seqlen,
                cell.seed,
                model=self.model,
                bos=bos if cell.calibration == SELF else self._choose(bos),
                text_field=self.text_field,
            )
        return drawn[bos]


def _cpu_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


@torch.no_grad()
def restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Copies the tensors ``dense``, by name, into the model's parameters. Tied parameters occur once."""
    for name, value in model.named_parameters():
        value.copy_(dense[name])


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256, in hex, of the name, shape and first values of each parameter. It tells two models apart."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.detach().flatten()[:_VALUES_HASHED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
