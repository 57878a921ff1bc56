"""Sound from files, for a model's own feature extractor. Needs soundfile."""

from pathlib import Path

import torch
from torch import Tensor

from ace_ext.errors import InputError


def read_audio(file: Path, rate: int) -> Tensor:
    """A sound as float32 ``[samples]`` from -1 to 1; channels are averaged.

    Sound of another rate is not resampled: the result would depend on the resampler.

    Args:
        file: of a format that libsndfile reads: WAV, FLAC, Ogg, MP3.
        rate: the samples a second that the model was trained on.

    Raises:
        InputError: the file is not sound, or is broken, empty or of another rate; soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise InputError(f"input: {file} needs soundfile to be read; pip install 'ace_ext[audio]'") from error
    try:
        sound, own_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise InputError(
            f"input: {file} is not a sound file that libsndfile reads ({error}); remove or replace it"
        ) from error
    if own_rate != rate:
        raise InputError(
            f"input: {file} has {own_rate} samples a second, and the model needs {rate}; resample it, as by "
            f"ffmpeg -i IN -ar {rate} OUT"
        )
    samples = torch.from_numpy(sound).mean(1)
    if not len(samples) or not bool(samples.isfinite().all()):
        raise InputError(f"input: {file} has no samples, or samples that are not finite; remove or replace it")
    return samples
