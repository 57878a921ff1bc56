"""One run of a comparison after another on the same loaded model, each from the dense weights, with its own peak."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .calibration import CalibrationData, evaluation_tokens, load_windows
from .checkpoint import LoadedModel
from .config import PruneConfig
from .driver import prune_model
from .evaluate import Perplexity, perplexity
from .memory import reset_peak
from .results import BlockFigures, Cell, Run

_VALUES_HASHED = 4096  # of each parameter: enough to tell fine-tuned or pruned weights from others, and quick


class Bench:
    """The loaded model, a CPU copy of its dense weights, the evaluation texts, the calibration windows last drawn."""

    def __init__(
        self, loaded: LoadedModel, texts: Iterable[str], eval_seqlen: int, eval_windows: int, text_field: str
    ) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.eval_seqlen, self.eval_windows, self.text_field = eval_seqlen, eval_windows, text_field
        self.device = next(self.model.parameters()).device
        self.dense = {name: _cpu_copy(value) for name, value in self.model.named_parameters()}
        self.texts = {text: evaluation_tokens(text, loaded.tokenizer, text_field=text_field) for text in texts}
        self._windows: tuple[tuple, CalibrationData] | None = None

    def run(self, cell: Cell, config: PruneConfig, source_sha256: str | None) -> Run:
        """Puts the dense weights back, prunes and evaluates."""
        restore(self.model, self.dense)
        data = self._draw(cell)
        own_peak = reset_peak(self.device)
        report = prune_model(self.model, data.tokens, config)
        return Run(
            cell=cell,
            config=report.config,
            source_sha256=source_sha256,
            tokens_sha256=data.sha256,
            dtype=report.dtype,
            sparsity=report.sparsity,
            seconds=report.seconds,
            peak_memory_bytes=report.peak_memory_bytes,
            own_peak=own_peak,
            perplexity=self.evaluate(),
            blocks=[BlockFigures.of(block) for block in report.blocks],
        )

    def evaluate(self) -> dict[str, Perplexity]:
        """Perplexity of the model as it is now, by text."""
        seqlen = self.eval_seqlen
        size = seqlen * self.eval_windows
        return {text: perplexity(self.model, tokens, seqlen, size) for text, tokens in self.texts.items()}

    def _draw(self, cell: Cell) -> CalibrationData:
        """Windows for the cell. The model is dense here: with the source ``self`` it is the dense model that writes."""
        wanted = (cell.calibration, cell.nsamples, cell.seqlen, cell.seed)
        if self._windows is None or self._windows[0] != wanted:
            source, *numbers = wanted
            options = {"model": self.model, "text_field": self.text_field}
            data = load_windows(source, self.loaded.tokenizer, *numbers, **options)
            self._windows = (wanted, data)
        return self._windows[1]


def _cpu_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


@torch.no_grad()
def restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Copies ``dense``, by name, into the model's parameters, in place. Tied parameters are there once."""
    for name, value in model.named_parameters():
        value.copy_(dense[name])


def weights_sha256(model: nn.Module) -> str:
    """Tells models apart: SHA-256, in hex, of each parameter's name, shape and first values."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.detach().flatten()[:_VALUES_HASHED].float().cpu().numpy().tobytes())
    return digest.hexdigest()
