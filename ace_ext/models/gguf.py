"""What it takes to load a model that is not used as it lies in its files: a GGUF file, without unpacking it."""

import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ace_ext.errors import InputError
from ace_ext.process_memory import resident_bytes


@dataclass(frozen=True)
class Unpacking:
    """``peak_bytes``: the most that loading holds beside the loaded weights. ``seconds``: what it takes, about."""

    peak_bytes: int
    seconds: float


def gguf_skeleton(file: Path, dtype: torch.dtype) -> tuple[nn.Module, object, Unpacking]:
    """The model of a GGUF file with every parameter on the meta device, its tokenizer, and what unpacking will take.

    Raises:
        InputError: the file is none that transformers knows.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError(f"model {str(file)!r} could not be laid out: {' '.join(str(error).split())[:400]}") from error
    model.tie_weights()
    return model.eval(), tokenizer, _unpacking(file, dtype)


def _unpacking(file: Path, dtype: torch.dtype) -> Unpacking:
    """From the sizes in the file's header.

    transformers maps the file and unpacks its tensors in their order. Beside the results so far there are then: the
    reader's index (each word of the vocabulary is an array of its own: measured here), the file's pages so far, and of
    the tensor at hand its float32 values twice. SmolLM2-135M in Q4_1 was measured to peak at its end, where the whole
    file is mapped: 98 MB of pages, 269 MB of bfloat16 weights and 150 MB for the reader.
    """
    from gguf import GGUFReader, dequantize

    before = resident_bytes()
    reader = GGUFReader(file)
    index = max(0, resident_bytes() - before)
    total = sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize
    peak = done = mapped = 0
    for tensor in reader.tensors:
        size = int(tensor.n_elements)
        mapped += int(tensor.n_bytes)
        done += size * dtype.itemsize
        peak = max(peak, done + mapped + 8 * size)
    sample = min(reader.tensors, key=lambda tensor: abs(int(tensor.n_elements) - 2**20))
    start = time.perf_counter()
    dequantize(sample.data, sample.tensor_type)
    seconds = (time.perf_counter() - start) * total / dtype.itemsize / int(sample.n_elements)
    return Unpacking(index + max(0, max(peak, total + mapped) - total), seconds)
