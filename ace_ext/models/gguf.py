"""GGUF files: a model's structure without unpacking its weights, and the memory and time that unpacking takes."""

import time
from pathlib import Path

import torch
from torch import nn

from ace_ext.models.gguf_header import gguf_reader, read_once
from ace_ext.models.location import ModelLocation, as_input_error
from ace_ext.models.skeleton import Unpacking, empty_model
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.process_memory import resident_bytes


def gguf_skeleton(file: Path, dtype: torch.dtype) -> tuple[nn.Module, Tokenizer, Unpacking]:
    """The model of a GGUF file with every parameter on the meta device, its tokenizer, and what unpacking will take.

    Raises:
        InputError: transformers cannot read the file.
    """
    location = ModelLocation(str(file.parent), file.name)
    with as_input_error(f"model {str(file)!r} could not be laid out"), read_once():
        tokenizer = location.tokenizer()
        model = empty_model(location.config(), dtype)
    return model, tokenizer, _unpacking(file, dtype)


def _unpacking(file: Path, dtype: torch.dtype) -> Unpacking:
    """Estimates memory and time from the sizes in the file's header.

    transformers maps the file and unpacks its tensors in their order. At each tensor, memory holds the weights unpacked
    so far, the reader's index (measured here; each word of the vocabulary is an array of its own), the pages of the
    file read so far, and twice the tensor's float32 values. SmolLM2-135M in Q4_1 peaks at its end, where the whole file
    is mapped: 98 MB of pages, 269 MB of bfloat16 weights and 77 MB for the reader.
    """
    from gguf import dequantize

    before = resident_bytes()
    reader = gguf_reader(file)
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
