"""Measures a packed model beside the dense one: load time, memory, decoding, prefill, files, and how logits differ.

Both models are in one process and run alternately, so that other load of the machine affects both. Load time and memory
are measured in separate processes.
"""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.bench.settings import BenchProgress, BenchSettings, text_config_of
from ace_ext.data.requests import positions_in
from ace_ext.errors import InputError
from ace_ext.models._transformers import cache_arguments, embedding_weight
from ace_ext.models.checksums import file_sha256
from ace_ext.models.loading import load_model
from ace_ext.models.location import remote_code, remote_code_allowed
from ace_ext.packed.files import SUFFIX, PackedShards
from ace_ext.process_memory import available_bytes, resident_bytes
from ace_ext.runtime.loading import open_model

LOADS = 3
"""Each model is loaded at most this often in a separate process, after a first load that is not counted. Loading takes
most of the time of a short run."""


def pair_steps(settings: BenchSettings) -> int:
    """Calls of ``step``: the loads and runs of both models, those that are not counted included."""
    return 2 * (1 + min(settings.rounds, LOADS) + settings.runs)


@dataclass
class Difference:
    """How logits differ from those of a reference, over all tokens that were compared."""

    largest: float = 0.0
    """The largest difference of one logit."""
    squares: float = 0.0
    """The sum of the squared differences."""
    spread: float = 0.0
    """The sum of the squared deviations of the reference's logits from their mean over the vocabulary."""

    @property
    def relative(self) -> float:
        """The root mean square difference, relative to the standard deviation of the reference's logits."""
        return math.sqrt(self.squares / self.spread) if self.spread else 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Adds the logits ``[batch, tokens, vocabulary]`` of both."""
        for one, two in zip(reference.flatten(0, -2), other.flatten(0, -2), strict=True):  # float32 copies stay small
            change = two.float() - one.float()
            self.largest = max(self.largest, float(change.abs().max()))
            self.squares += float(change.square().sum())
            self.spread += float((one.float() - one.float().mean()).square().sum())


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
    """Seconds until the model is loaded; its files have been read before."""
    memory: Pair | None = None
    """Bytes that loading and one token add to the process's resident memory, mapped files included."""
    files: Pair | None = None
    """Bytes of the weight files."""
    logits: Difference = field(default_factory=Difference)
    """Packed from dense, over prefill and every decoded token. The weights are the same bit for bit; the kernels add
    products in another order, and round differently."""
    rounding: Difference | None = None
    """For scale: the dense model from itself in float32, over the prefill. None for a float32 model, and where the
    float32 copy does not fit into memory."""


def bench(dense: str, packed: str, settings: BenchSettings, progress: BenchProgress | None = None) -> BenchResult:
    """Measures both models on the CPU, with torch's threads.

    Args:
        dense: the folder that was packed.
        packed: the packed folder.
        settings: how much is measured.
        progress: is told how the work proceeds.

    Raises:
        InputError: a folder cannot be loaded, or ``dense`` is not the folder that was packed.
    """
    progress = progress or BenchProgress()
    progress.phase("comparing the folders")
    _check_same(dense, packed)
    prefill = settings.prefill_within(positions_in(text_config_of(dense)))  # before the models are loaded
    sizes = _bytes(dense, False), _bytes(packed, True)
    progress.phase("loading each model in a separate process")
    pairs: list[list[tuple[float, float]]] = []
    for _ in range(1 + min(settings.rounds, LOADS)):
        pairs.append([])
        for folder in (dense, packed):
            pairs[-1].append(_in_a_process(folder))
            progress.step()
    del pairs[0]  # these loads read the files from the disk
    models = load_model(dense).model, open_model(packed).model
    result = BenchResult(
        dense,
        packed,
        str(embedding_weight(models[0]).dtype).removeprefix("torch."),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        settings.rounds,
        prefill_tokens=prefill,
    )
    result.files = _smaller([sizes[0]], [sizes[1]])
    result.load = _smaller([pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs])
    result.memory = _smaller([pair[0][1] for pair in pairs], [pair[1][1] for pair in pairs])
    with torch.inference_mode():
        prompt = _measure_runs(models, settings, result, progress)
        model = models[0]
        del models  # the packed one is not needed any more
        result.rounding = _rounding(model, prompt)
    return result


def _check_same(dense: str, packed: str) -> None:
    for one in PackedShards(packed, mapped=False).packed:
        file = Path(dense).expanduser() / f"{one.path.name.removesuffix(SUFFIX)}.safetensors"
        if not file.is_file() or file_sha256(file) != one.origin.sha256:
            raise InputError(
                f"dense must be the folder that was packed: {str(file)!r} is not the file of which {str(one.path)!r} "
                "was made; leave out --dense"
            )


def _measure_runs(
    models: tuple[nn.Module, nn.Module], settings: BenchSettings, result: BenchResult, progress: BenchProgress
) -> Tensor:
    """Measures decoding and prefill; returns the tokens of the prefill."""
    vocabulary = len(embedding_weight(models[0]))
    random = torch.Generator().manual_seed(0)

    def draw(batch: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (batch, length), generator=random)

    alternate = partial(_alternate, models, settings.rounds, result.logits, progress.step)
    for batch in settings.batches:
        progress.phase(f"decoding, batch {batch}")
        tokens = draw(batch, settings.prompt + settings.tokens)
        found = alternate(partial(_decode, tokens, settings.prompt))
        dense, packed = ([batch * settings.tokens / seconds for seconds in runs] for runs in found)
        result.decode[batch] = Pair(
            statistics.median(dense),
            statistics.median(packed),
            statistics.median(p / d for d, p in zip(dense, packed, strict=True)),
        )
    progress.phase(f"prefill of {result.prefill_tokens} tokens")
    prompt = draw(1, result.prefill_tokens)
    result.prefill = _smaller(*alternate(partial(_prefill, prompt)))
    return prompt


def _decode(tokens: Tensor, prompt: int, model: nn.Module) -> tuple[float, Tensor]:
    """Seconds of the tokens after the prompt, which are given and read one by one, and the logits of all tokens."""
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
    rounds: int,
    difference: Difference,
    step: Callable[[], object],
    run: Callable[[nn.Module], tuple[float, Tensor]],
) -> tuple[list[float], list[float]]:
    """Seconds of each model's runs. Each model is first in every second round; the first round is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        logits: dict[int, Tensor] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            taken, logits[which] = run(models[which])
            if number:
                seconds[which].append(taken)
            step()
        if not number:  # further rounds compute the same
            difference.add(logits[0], logits[1])
    return seconds


def _rounding(model: nn.Module, prompt: Tensor) -> Difference | None:
    """How the logits of a dense model differ from its own in float32, into which it is converted."""
    parameters = list(model.parameters())
    needed = 4 * sum(parameter.numel() for parameter in parameters)
    if all(parameter.dtype == torch.float32 for parameter in parameters) or needed > available_bytes():
        return None
    found = Difference()
    own = _prefill(prompt, model)[1]
    found.add(_prefill(prompt, model.float())[1], own)
    return found


def _smaller(dense: list[float], packed: list[float]) -> Pair:
    """A pair of figures, of which the smaller one is better."""
    ratio = statistics.median(d / max(p, 1e-12) for d, p in zip(dense, packed, strict=True))
    return Pair(statistics.median(dense), statistics.median(packed), ratio)


def _bytes(folder: str, packed: bool) -> int:
    files = Path(folder).expanduser().glob(f"*{SUFFIX}" if packed else "*.safetensors")
    return sum(file.stat().st_size for file in files)


def _in_a_process(folder: str) -> tuple[float, float]:
    """Seconds and bytes of :func:`_load` in a new process, which is ended if the caller is interrupted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_send_load, args=(sender, folder, torch.get_num_threads(), remote_code_allowed()), daemon=True
    )
    child.start()
    sender.close()  # so that the end of the child ends recv()
    try:
        found: tuple[float, float] | InputError | None = receiver.recv()
    except EOFError:
        found = None
    except BaseException:
        child.kill()
        raise
    finally:
        child.join()
        receiver.close()
    if found is None:
        raise InputError(
            f"{folder!r} could not be loaded in a separate process, which ended with status {child.exitcode}; is there "
            "enough memory?"
        )
    if isinstance(found, InputError):
        raise found
    return found


def _send_load(sender: Any, *arguments: Any) -> None:
    try:
        sender.send(_load(*arguments))
    except InputError as error:
        sender.send(error)


def _load(folder: str, threads: int, allowed: bool) -> tuple[float, float]:
    """Seconds of loading a model, and the resident bytes that loading and one token add. A skeleton of the same model
    is made before, which loads the libraries."""
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
