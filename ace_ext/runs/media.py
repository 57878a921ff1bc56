"""Calibration of a run on images, sound, or pairs of either with text."""

from pathlib import Path

from torch import Tensor

from ace_ext.data.media import load_processor, media_batches
from ace_ext.data.media_items import is_media
from ace_ext.models.skeleton import skeleton
from ace_ext.runs.options import Calibration, Reader

BATCH = 8
"""Samples that go through the model together. Whisper makes 1,500 positions of each."""


def reader_of(source: str) -> Reader | None:
    """What reads a calibration source that is no text; None for text."""
    return read_media if is_media(source) else None


def read_media(folder: Path, calibration: Calibration) -> list[dict[str, Tensor]]:
    """The inputs that a model's own processor makes of the files of ``calibration.source``.

    Args:
        folder: the model's, with its processor's files.
        calibration: the source, the number of samples and the seed.

    Raises:
        InputError: as :func:`ace_ext.data.media.media_batches`; or the folder has no processor.
    """
    model = skeleton(folder, None, "float32", causal=False)  # only its forward's arguments and configuration are read
    processor = load_processor(str(folder))
    return media_batches(calibration.source, processor, model, calibration.nsamples, BATCH, calibration.seed)
