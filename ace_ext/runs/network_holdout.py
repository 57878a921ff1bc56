"""The agreement of a pruned network with the dense one, on a few inputs that calibration does not read: a rough check
of what pruning cost. For causal language models :mod:`ace_ext.runs.holdout` measures perplexity instead."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from ace_ext.data.bos import BosChoice
from ace_ext.data.held_out_inputs import (
    LEAST,
    HeldOutInputs,
    Measured,
    compare,
    measure,
    media_samples,
    text_samples,
    text_windows,
)
from ace_ext.data.local_files import same_file
from ace_ext.data.media_items import is_media
from ace_ext.data.requests import sample_count
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.records import PruneReport
from ace_ext.runs.holdout import WINDOW_TOKENS, measured_text
from ace_ext.runs.model_source import Source
from ace_ext.runs.options import EVALUATE_AUTO, RunRequest
from ace_ext.runtime import open_model

SAMPLES = 32
"""An upper bound for the samples on which agreement is measured."""


class NetworkMeasurement:
    """The agreement of a run's pruned model with the dense one, for a network that is no causal language model.

    Args:
        inputs: on which it is measured.
        model: it is in memory.
        loaded: ``loaded(folder)`` is the model of a folder.
    """

    def __init__(self, inputs: HeldOutInputs, model: nn.Module, loaded: Callable[[Path], nn.Module]) -> None:
        self._inputs, self._model, self._loaded = inputs, model, loaded
        self._dense: Measured | None = None

    def before(self) -> None:
        """Measures the dense model."""
        self._dense = measure(self._model, self._inputs)

    def follow(self, blocks: BlockSource) -> None:
        """Nothing: the model is measured whole, whatever its blocks are."""

    def after(self, report: PruneReport, folder: Path | None) -> None:
        """As :meth:`ace_ext.runs.holdout.Measurement.after`."""
        assert self._dense is not None  # before() comes first
        pruned = self._model if folder is None else self._loaded(folder)
        report.agreement = compare(self._dense, measure(pruned, self._inputs), self._inputs)


def network_measurement_for(
    request: RunRequest, source: Source, bos: BosChoice | None, tell: Callable[[str], None]
) -> NetworkMeasurement | None:
    """The measurement of a run: on text of the calibration's source, or on images or sound that calibration does not
    draw. None if it measures nothing. If ``auto`` finds nothing to measure on, ``tell`` is called with a line that says
    why.

    Raises:
        InputError: a source was named and cannot be used.
    """
    if not request.evaluates:
        return None

    def loaded(folder: Path) -> nn.Module:
        return open_model(str(folder), device=request.device, causal=False).model

    try:
        if source.offloaded:
            raise InputError("the model is not in memory (offload disk)")
        return NetworkMeasurement(held_out_inputs(request, source, bos), source.model, loaded)
    except InputError as error:
        if request.calibration.evaluate != EVALUATE_AUTO:
            raise
        tell(f"agreement with the dense model is not measured: {error}")
        return None


def held_out_inputs(request: RunRequest, source: Source, bos: BosChoice | None) -> HeldOutInputs:
    """The inputs on which a run measures agreement.

    Raises:
        InputError: there are fewer than three samples.
    """
    text = request.calibration
    if bos is None:
        wanted = text.source if text.evaluate == EVALUATE_AUTO else text.evaluate
        after = text.nsamples if same_file(wanted, text.source) else 0
        assert source.files.folder is not None  # its processor was read from there
        if not is_media(wanted):
            raise InputError(f"evaluate must be images or sound, as the calibration is (got {wanted!r}); give such")
        found = media_samples(wanted, str(source.files.folder), source.model, SAMPLES, text.seed, after)
        if sample_count(found.batches) < LEAST:
            raise InputError(
                f"evaluate: {wanted} has fewer than {LEAST} samples that calibration does not take; give more"
            )
        return found
    name, ids = measured_text(request, source.tokenizer, bos)
    seqlen = min(WINDOW_TOKENS, text.seqlen)
    windows = text_windows(source.model, ids, bos.token, seqlen, SAMPLES, ("evaluate", name))
    return HeldOutInputs(f"{windows.shape[1]} tokens of {name}", text_samples(source.model, windows))
