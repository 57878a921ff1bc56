"""Measures several candidates with the same threads, in turns: the dense folder, packed folders, folders of smaller
models, and the weights of dense and smaller ones in other engines."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ace_ext.bench.candidates import DENSE, LLAMA, VLLM, Candidate
from ace_ext.bench.gguf_writer import check_writable, write_gguf
from ace_ext.bench.settings import BenchProgress, BenchSettings, text_config_of
from ace_ext.bench.worker import Worker
from ace_ext.data.requests import positions_in
from ace_ext.errors import InputError
from ace_ext.models.gguf_header import gguf_reader
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed.files import PackedShards

_SAME = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Settings that are equal in models of the same shapes."""
_SAME_IN_SMALLER = ("model_type", "vocab_size")
"""Settings that are equal in a model and one without some of its structures."""
_PACKED = "give folders of models of the same shapes"
_SMALLER = "give folders of models of the same type and vocabulary"


@dataclass
class Figures:
    """What was measured of one candidate. Speeds are medians of its runs; ratios are to the dense folder, medians over
    rounds."""

    name: str
    engine: str
    """With its version and the instruction sets that it uses."""
    file_bytes: int
    bits: float
    """Of the weight files, for each weight of the dense folder."""
    program_bytes: int = 0
    """Resident memory of the process before the model was loaded."""
    memory_bytes: int = 0
    """Resident memory of the process with the model loaded, after one token. Program and mapped files count."""
    decode: dict[int, float] = field(default_factory=dict)
    """Tokens a second, by batch size."""
    decode_ratios: dict[int, float] = field(default_factory=dict)
    prefill: float = 0.0
    """Tokens a second."""
    prefill_ratio: float = 1.0
    beside: str = ""
    """For a smaller model: the candidate with the dense one in the same engine and type of weights."""
    beside_decode: dict[int, float] = field(default_factory=dict)
    """How many times as fast as that candidate, by batch size."""
    beside_prefill: float = 1.0


@dataclass
class ContestResult:
    """What :func:`contest` found. The first candidate is the dense folder in torch."""

    dtype: str
    threads: int
    rounds: int
    tokens: int
    """New tokens of each decoding run."""
    prefill_tokens: int
    figures: list[Figures] = field(default_factory=list)


def contest_steps(candidates: int, settings: BenchSettings) -> int:
    """Calls of ``step``: the loads and runs of all candidates."""
    return candidates * (1 + settings.runs)


def check_shapes(dense: str | Path, folders: Sequence[Candidate]) -> None:
    """Checks that packed folders hold models of the same shapes as the dense folder, and others models of the same type
    and vocabulary. Their weights may differ.

    Raises:
        InputError: they do not, or a folder cannot be read.
    """
    Shards(Path(dense).expanduser())
    expected = _shapes(dense)
    for candidate in folders:
        if candidate.beside:
            Shards(candidate.path)
        else:
            PackedShards(candidate.path, mapped=False)
        found = _shapes(candidate.path)
        for name in _SAME_IN_SMALLER if candidate.beside else _SAME:
            if found[name] != expected[name]:
                kind = "" if candidate.beside else "packed "
                remedy = _SMALLER if candidate.beside else _PACKED
                raise InputError(
                    f"{kind}folder {str(candidate.path)!r} has {name} {found[name]}, the dense folder "
                    f"{expected[name]}; {remedy}"
                )


def check_gguf(dense: str | Path, sources: Sequence[str | Path], smaller: Sequence[Candidate] = ()) -> None:
    """Checks that the dense folder and smaller ones can be written as GGUF, if a type is among the sources, and that
    files hold as many weights as the dense folder.

    Raises:
        InputError: a class or setting that :func:`ace_ext.bench.gguf_writer.check_writable` refuses, or a file of
            another model.
    """
    if any(isinstance(source, str) for source in sources):
        for folder in (dense, *(own.path for own in smaller)):
            check_writable(folder)
    weights, _ = _weights(dense)
    for source in sources:
        if isinstance(source, Path):
            own = sum(int(tensor.n_elements) for tensor in gguf_reader(source).tensors)
            if abs(own - weights) > weights / 100:  # files of llama.cpp may have rotary factors too
                raise InputError(
                    f"against {str(source)!r} has {own} weights, the dense folder {weights}; give a file of a model of "
                    "the same shapes"
                )


def gguf_candidates(
    dense: str | Path,
    sources: Sequence[str | Path],
    place: Path,
    progress: BenchProgress | None = None,
    smaller: Sequence[Candidate] = (),
) -> list[Candidate]:
    """Candidates for llama.cpp. The weights of a dense folder are written as GGUF into ``place``, a file for each type
    among the sources, and those of each smaller one beside them."""
    progress = progress or BenchProgress()
    found = []
    for source in sources:
        if isinstance(source, Path):
            found.append(Candidate(f"{LLAMA} {source.name}", source, LLAMA))
            continue
        progress.phase(f"writing the weights as GGUF, {source}")
        file = place / f"{source}.gguf"
        write_gguf(dense, file, source)
        found.append(Candidate(f"{LLAMA} {source}", file, LLAMA))
        for number, own in enumerate(smaller):
            file = place / f"{source}-{number}.gguf"
            write_gguf(own.path, file, source)
            found.append(Candidate(f"{LLAMA} {source} {own.name}", file, LLAMA, f"{LLAMA} {source}"))
    return found


def vllm_candidates(dense: str | Path, smaller: Sequence[Candidate]) -> list[Candidate]:
    """Candidates for vLLM: the dense folder, and smaller ones."""
    first = Candidate(f"{VLLM} {DENSE}", Path(dense).expanduser().resolve(), VLLM)
    return [first, *(Candidate(f"{VLLM} {own.name}", own.path, VLLM, first.name) for own in smaller)]


def contest(
    dense: str | Path,
    others: Sequence[Candidate],
    settings: BenchSettings,
    progress: BenchProgress | None = None,
) -> ContestResult:
    """Measures the dense folder in torch, and ``others``, on the CPU with torch's number of threads.

    In each round every candidate makes one run, and each round starts with the next candidate. The first round is not
    counted. Tokens are random and the same for all, except that llama.cpp chooses those that it decodes.

    Args:
        dense: a dense folder.
        others: packed folders and GGUF files of models of the same shapes, and smaller models.
        settings: how much is measured.
        progress: is told how the work proceeds.

    Raises:
        InputError: a candidate cannot be loaded or run.
    """
    progress = progress or BenchProgress()
    weights, dtype = _weights(dense)
    config = text_config_of(dense)
    prefill = settings.prefill_within(positions_in(config))
    threads = torch.get_num_threads()
    result = ContestResult(dtype, threads, settings.rounds, settings.tokens, prefill)
    with contextlib.ExitStack() as opened:
        workers = []
        for candidate in (Candidate(DENSE, Path(dense).expanduser().resolve()), *others):
            progress.phase(f"loading {candidate.name}")
            worker = opened.enter_context(Worker(candidate, threads))
            worker.load(settings.prompt + settings.tokens + 1)
            size = candidate.file_bytes()
            own = Figures(candidate.name, worker.engine, size, 8 * size / weights, worker.program, worker.memory())
            own.beside = candidate.beside
            result.figures.append(own)
            workers.append(worker)
            progress.step()
        _measure(workers, config.vocab_size, settings, result, progress)
    return result


def _measure(
    workers: list[Worker], vocabulary: int, settings: BenchSettings, result: ContestResult, progress: BenchProgress
) -> None:
    random = torch.Generator().manual_seed(0)

    def draw(batch: int, length: int) -> Any:
        return torch.randint(vocabulary, (batch, length), generator=random).tolist()

    for batch in settings.batches:
        progress.phase(f"decoding, batch {batch}")
        prompts, tokens = draw(batch, settings.prompt), draw(batch, settings.tokens)
        seconds = _turns(
            workers, settings.rounds, progress.step, partial(Worker.decode, prompts=prompts, tokens=tokens)
        )
        _check_measured(result.figures, seconds, f"{settings.tokens} tokens at batch {batch}")
        for own, runs, ratio in zip(result.figures, seconds, _ratios(seconds), strict=True):
            own.decode[batch] = batch * settings.tokens / statistics.median(runs)
            own.decode_ratios[batch] = ratio
        for place, ratio in _beside(result, seconds).items():
            result.figures[place].beside_decode[batch] = ratio
    progress.phase(f"prefill of {result.prefill_tokens} tokens")
    prompt = draw(1, result.prefill_tokens)[0]
    seconds = _turns(workers, settings.rounds, progress.step, partial(Worker.prefill, prompt=prompt))
    _check_measured(result.figures, seconds, "the prefill")
    for own, runs, ratio in zip(result.figures, seconds, _ratios(seconds), strict=True):
        own.prefill = result.prefill_tokens / statistics.median(runs)
        own.prefill_ratio = ratio
    for place, ratio in _beside(result, seconds).items():
        result.figures[place].beside_prefill = ratio


def _turns(
    workers: list[Worker], rounds: int, step: Callable[[], object], run: Callable[[Worker], float]
) -> list[list[float]]:
    """Seconds of each worker's runs, ``[workers][rounds]``."""
    seconds: list[list[float]] = [[] for _ in workers]
    for number in range(rounds + 1):
        for place in range(len(workers)):
            which = (number + place) % len(workers)
            taken = run(workers[which])
            if number:
                seconds[which].append(taken)
            step()
    return seconds


def _check_measured(figures: list[Figures], seconds: list[list[float]], what: str) -> None:
    """Raises :class:`InputError` for a median that is not above zero: some engines' times are differences of two."""
    for own, runs in zip(figures, seconds, strict=True):
        if statistics.median(runs) <= 0:
            raise InputError(
                f"{own.name}: {what} took less time than the measurement varies; raise --tokens or --rounds, or "
                "measure where no other program runs"
            )


def _beside(result: ContestResult, seconds: list[list[float]]) -> dict[int, float]:
    """How many times as fast as the dense model in the same engine each smaller one is, by its place."""
    names = [own.name for own in result.figures]
    pairs = [(place, names.index(own.beside)) for place, own in enumerate(result.figures) if own.beside]
    return {place: _ratios([seconds[dense], seconds[place]])[1] for place, dense in pairs}


def _ratios(seconds: list[list[float]]) -> list[float]:
    """How many times as fast as the first each is."""
    return [statistics.median(first / own for first, own in zip(seconds[0], runs, strict=True)) for runs in seconds]


def _shapes(folder: str | Path) -> dict[str, Any]:
    config = text_config_of(folder)
    return {name: getattr(config, name, None) for name in _SAME}


def _weights(dense: str | Path) -> tuple[int, str]:
    """The number of weights of a dense folder, and their dtype."""
    shards = Shards(Path(dense).expanduser())
    return sum(prod(entry.shape) for entry in shards.entries.values()), str(shards.dtype).removeprefix("torch.")
