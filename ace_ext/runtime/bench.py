"""Measures a packed model beside the dense one: load time, memory, decoding, prefill, files, and how logits differ.

Both models are in one process and take turns, so that what else the machine does meets both. Load time and memory are
those of processes of their own.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.data.requests import positions_of
from ace_ext.errors import InputError
from ace_ext.models._transformers import cache_arguments, embedding_weight
from ace_ext.models.loading import load_model
from ace_ext.models.location import remote_code, remote_code_allowed
from ace_ext.packed.files import SUFFIX
from ace_ext.process_memory import resident_bytes
from ace_ext.runtime.loading import open_model

LOADS = 3
"""At most so often is each model loaded in a process of its own, after a first time; that is most of the time of a
short run."""


@dataclass(frozen=True)
class BenchSettings:
    """How much is measured.

    Raises:
        InputError: a number that is not positive.
    """

    tokens: int = 16
    """New tokens of each decoding run."""
    rounds: int = 5
    """Runs of each model; medians are reported."""
    batches: tuple[int, ...] = (1, 4, 16)
    prompt: int = 8
    """Tokens before the new ones."""
    prefill: int = 512
    """Tokens of a prefill, or what the model takes at most."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise InputError(f"{name} must be positive (got {value})")


@dataclass(frozen=True)
class Pair:
    """A figure of both models. ``ratio``: how much better the packed one is, the median over pairs of runs."""

    dense: float
    packed: float
    ratio: float


@dataclass
class BenchResult:
    """What :func:`bench` found."""

    dense: str
    packed: str
    dtype: str
    threads: int
    capability: str
    """The instruction set that torch uses."""
    rounds: int
    decode: dict[int, Pair] = field(default_factory=dict)
    """Tokens a second, by batch size."""
    prefill_tokens: int = 0
    prefill: Pair | None = None
    """Seconds."""
    load: Pair | None = None
    """Seconds until the model is there; its files have been read before."""
    memory: Pair | None = None
    """Bytes that loading and one token add to the process's resident memory, mapped files included."""
    files: Pair | None = None
    """Bytes of the weight files."""
    logits_difference: float = 0.0
    """The largest one, over prefill and every decoded token; ``logits_size`` is the largest logit."""
    logits_size: float = 0.0


def bench(
    dense: str, packed: str, settings: BenchSettings, tell: Callable[[str], None] = lambda _: None
) -> BenchResult:
    """Measures both models on the CPU, with torch's threads.

    Args:
        dense: the folder that was packed.
        packed: the packed folder.
        settings: how much is measured.
        tell: is given a line about what is measured now.

    Raises:
        InputError: a folder cannot be loaded.
    """
    sizes = _bytes(dense, False), _bytes(packed, True)
    tell("loading each model in a process of its own")
    first, *pairs = [(_in_a_process(dense), _in_a_process(packed)) for _ in range(1 + min(settings.rounds, LOADS))]
    del first  # it has read the files from the disk
    models = load_model(dense).model, open_model(packed).model
    result = BenchResult(
        dense,
        packed,
        str(embedding_weight(models[0]).dtype).removeprefix("torch."),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        settings.rounds,
    )
    result.files = _smaller([sizes[0]], [sizes[1]])
    result.load = _smaller([pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs])
    result.memory = _smaller([pair[0][1] for pair in pairs], [pair[1][1] for pair in pairs])
    with torch.inference_mode():
        _measure_runs(models, settings, result, tell)
    return result


def _measure_runs(
    models: tuple[nn.Module, nn.Module], settings: BenchSettings, result: BenchResult, tell: Callable[[str], None]
) -> None:
    vocabulary = len(embedding_weight(models[0]))
    limit = positions_of(models[0]) or settings.prefill
    random = torch.Generator().manual_seed(0)

    def draw(batch: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (batch, length), generator=random)

    for batch in settings.batches:
        tell(f"decoding, batch {batch}")
        tokens = draw(batch, settings.prompt + settings.tokens)
        found = _alternate(models, partial(_decode, tokens, settings.prompt), settings.rounds, result)
        dense, packed = ([batch * settings.tokens / seconds for seconds in runs] for runs in found)
        result.decode[batch] = Pair(
            statistics.median(dense),
            statistics.median(packed),
            statistics.median(p / d for d, p in zip(dense, packed, strict=True)),
        )
    result.prefill_tokens = min(settings.prefill, limit)
    tell(f"prefill of {result.prefill_tokens} tokens")
    prompt = draw(1, result.prefill_tokens)
    result.prefill = _smaller(*_alternate(models, partial(_prefill, prompt), settings.rounds, result))


def _decode(tokens: Tensor, prompt: int, model: nn.Module) -> tuple[float, Tensor]:
    """Seconds of the tokens after the prompt, one by one (given ones, so that both models do the same), and the logits
    of all."""
    output = model(tokens[:, :prompt], use_cache=True)
    logits = [output.logits[:, -1:]]
    start = time.perf_counter()
    for at in range(prompt, tokens.shape[1]):
        output = model(tokens[:, at : at + 1], use_cache=True, **cache_arguments(output))
        logits.append(output.logits)
    return time.perf_counter() - start, torch.cat(logits, dim=1)


def _prefill(tokens: Tensor, model: nn.Module) -> tuple[float, Tensor]:
    start = time.perf_counter()
    logits: Tensor = model(tokens, use_cache=True).logits
    return time.perf_counter() - start, logits


def _alternate(
    models: tuple[nn.Module, nn.Module],
    run: Callable[[nn.Module], tuple[float, Tensor]],
    rounds: int,
    result: BenchResult,
) -> tuple[list[float], list[float]]:
    """Seconds of each model's runs. Each begins every second round; a first round is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        logits: dict[int, Tensor] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            taken, logits[which] = run(models[which])
            if number:
                seconds[which].append(taken)
        difference = float((logits[0].float() - logits[1].float()).abs().max())
        result.logits_difference = max(result.logits_difference, difference)
        result.logits_size = max(result.logits_size, float(logits[0].abs().max()))
    return seconds


def _smaller(dense: list[float], packed: list[float]) -> Pair:
    """A pair of figures of which the smaller one is the better."""
    ratio = statistics.median(d / max(p, 1e-12) for d, p in zip(dense, packed, strict=True))
    return Pair(statistics.median(dense), statistics.median(packed), ratio)


def _bytes(folder: str, packed: bool) -> int:
    files = Path(folder).expanduser().glob(f"*{SUFFIX}" if packed else "*.safetensors")
    return sum(file.stat().st_size for file in files)


def _in_a_process(folder: str) -> tuple[float, float]:
    """Seconds and bytes of :func:`_load` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load, folder, torch.get_num_threads(), remote_code_allowed()).result()


def _load(folder: str, threads: int, allowed: bool) -> tuple[float, float]:
    """Seconds of loading a model, and the resident bytes that it and one token add. Another model of the same kind has
    been made before, so that the libraries are there."""
    from ace_ext.models.skeleton import skeleton

    torch.set_num_threads(threads)
    with remote_code(allowed):
        skeleton(folder, None)
        before = resident_bytes()
        start = time.perf_counter()
        model: Any = open_model(folder).model
        seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64))
    return seconds, float(resident_bytes() - before)
