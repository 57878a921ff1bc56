"""``ace-prune plan``: what a run would prune, and the memory and time it would take. It changes no file and no model.

Shapes come from the model's configuration. The memory needed besides the model is measured: the plan loads the
tokenizer, draws the calibration text and prunes one block with a few tokens, as a run would. The time is extrapolated
from that trial. For a model without files (:mod:`ace_ext.runs.shapes_only`) the block has random weights, and the
memory is estimated from shapes alone.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ace_ext.data.bos import WINDOW_TOKENS, WINDOWS, BosChoice, undecided_bos
from ace_ext.data.corpora import SELF, SMALL_SOURCES
from ace_ext.data.generate import ROWS_TOGETHER
from ace_ext.dense_weights import DenseWeight, describe_dense, kind_of
from ace_ext.engine.api import check_pattern, check_whole_forwards
from ace_ext.engine.collection import UnseenExpertError
from ace_ext.engine.embeddings import check_tables
from ace_ext.engine.model_shape import ModelShape
from ace_ext.errors import InputError, counted
from ace_ext.formats import DEFAULT_FORMAT, format_named
from ace_ext.healing.distill import steps_of
from ace_ext.models._transformers import embedding_weight, main_input, predicts_tokens, text_config
from ace_ext.models.blocks import Block, stay_dense
from ace_ext.models.parts import list_of
from ace_ext.process_memory import available_bytes, peak_memory_bytes, reset_peak, resident_bytes
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.groups import keep_count
from ace_ext.records import Removed
from ace_ext.runs import holdout
from ace_ext.runs.dry_run import LARGE_BLOCK, Trial, not_walked, size_of, try_block
from ace_ext.runs.heal_trial import try_step
from ace_ext.runs.memory_model import Estimate, copied_bytes
from ace_ext.runs.model_source import Demand, MemoryChoice, Source, check_serves, sized
from ace_ext.runs.options import Calibration, InputCalibration, RunOptions, RunRequest, check_request
from ace_ext.runs.output_size import PlannedMatrix, bytes_of_all, is_estimate, output_bytes
from ace_ext.runs.prune_and_heal import check_text, needed_memory, planned_batches, text_of
from ace_ext.runs.removal import removal_seconds, smaller_of
from ace_ext.runs.shapes_only import open_for_plan

CARD = 24 * 10**9
"""Bytes of a common GPU's memory. The plan of a model without files compares its need with them."""


@dataclass(frozen=True)
class Plan:
    """The result of :func:`make_plan`. Sizes are in bytes; ``seconds`` are by part of the run."""

    model: str
    device: str
    dtype: str
    matrices: list[PlannedMatrix]
    blocks: int
    offload: bool
    resident_hidden: bool
    phases: list[Estimate]
    read_bytes: int
    write_bytes: int
    output_bytes: int
    """Of the weights in the output."""
    output_estimate: bool
    """Whether ``output_bytes`` is an estimate, because it depends on the weights."""
    seconds: dict[str, float]
    dense: list[DenseWeight]
    """The matrices that stay dense, and why. Only the run finds out whether a Linear is called."""
    bos: BosChoice | None
    """How calibration samples begin; None for images or sound. ``auto`` is undecided if it depends on the weights; no
    other figure depends on it, as the BOS token is one of a sample's tokens."""
    trial: str = ""
    """What the time was extrapolated from; empty if it is not known."""
    untried: str = ""
    """Why the time is not known; empty if it is."""
    need: dict[str, int] = field(default_factory=dict)
    """For a model without files: peak bytes with all weights in memory (``whole``), and with one block at a time
    (``offload``), if that is possible."""
    removed: list[Removed] = field(default_factory=list)
    """Structures that the run would remove first. ``matrices`` are then those of the smaller model."""
    estimate: str = ""
    """Why the smaller model may be another one; empty if it is this one."""

    @property
    def peak(self) -> Estimate:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    def to_json(self) -> str:
        """All fields as JSON, with totals."""
        phases = {phase.phase: {"total": phase.total, **phase.parts()} for phase in self.phases}
        total = {"peak_memory_bytes": self.peak.total, "peak_phase": self.peak.phase}
        seconds = {**self.seconds, "total": sum(self.seconds.values()) if self.trial else None}
        values = {name: value for name, value in asdict(self).items() if name not in ("removed", "estimate") or value}
        return json.dumps({**values, **total, "phases": phases, "seconds": seconds}, indent=1)

    def table(self) -> str:
        """Text for a terminal: a line for each kind of matrix, then memory, bytes read and written, and time."""
        lines = [record.summary() for record in self.removed]
        lines += [f"  candidate: {one.part}" for record in self.removed for one in record.tried]
        lines += [self.estimate] if self.estimate else []
        lines += self._kinds()
        weights = "one block at a time from the files" if self.offload else "all in memory"
        states = "in memory" if self.resident_hidden else "on the disk"
        lines += describe_dense(self.dense, sum(math.prod(matrix.shape) for matrix in self.matrices))
        lines.append(
            f"{counted(self.blocks, 'block')}, {counted(len(self.matrices), 'matrix')}; weights {weights}, "
            f"hidden states {states}"
        )
        for phase in sorted(self.phases, key=lambda phase: -phase.total):
            rank = "peak" if phase is self.peak else "then"
            lines.append(f"{rank} {phase.total / 1e9:.2f} GB in {phase.phase}: {phase.describe()}")
        lines += self._needs()
        lines.append(f"reads {self.read_bytes / 1e9:.2f} GB, writes {self.write_bytes / 1e9:.2f} GB")
        about = "about " if self.output_estimate else ""
        lines.append(f"weights in the output: {about}{self.output_bytes / 1e9:.3f} GB")
        lines.append(self._time())
        lines += [] if self.bos is None else [str(self.bos)]
        return "\n".join(lines)

    def _kinds(self) -> list[str]:
        """A line for each kind of matrix; none if no weight becomes zero."""
        kinds: dict[tuple[str, tuple[int, int], str, int, int], int] = {}
        for matrix in self.matrices:
            kind = (kind_of(matrix.name), matrix.shape, matrix.group, matrix.group_size, matrix.keep)
            kinds[kind] = kinds.get(kind, 0) + 1
        if not kinds:
            return []
        width = max(len(kind[0]) for kind in kinds)
        lines = [f"{'matrix':<{width}}  {'count':>5}  {'shape':>13}  {'group':>6}  kept"]
        lines += [
            f"{name:<{width}}  {count:>5}  {'x'.join(map(str, shape)):>13}  {group:>6}  {keep} of {size}"
            for (name, shape, group, size, keep), count in kinds.items()
        ]
        return lines

    def _needs(self) -> list[str]:
        """A line about the memory of a model without files."""
        if not self.need:
            return []
        modes = {"whole": "with all weights in memory", "offload": "with one block at a time (--offload disk)"}
        parts = [f"{size / 1e9:.2f} GB {modes[mode]}, {_fits(size)}" for mode, size in self.need.items()]
        return [f"memory: {'; '.join(parts)}"]

    def _time(self) -> str:
        if not self.trial:
            return f"time: not known {self.untried}"
        parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in self.seconds.items())
        return f"about {_duration(sum(self.seconds.values()))}: {parts} (extrapolated from {self.trial})"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _fits(size: int) -> str:
    return f"{'fits' if size <= CARD else 'does not fit'} {CARD / 1e9:.0f} GB"


@dataclass
class _Measured:
    """How calibration samples begin, and what drawing them took, in bytes and seconds."""

    bos: BosChoice | None  # undecided if a run measures the model; None for images or sound
    request: RunRequest  # with the samples that were read, if they are no text
    before_text: int = 0  # resident bytes before
    text_bytes: int = 0  # additional bytes at the peak
    text_seconds: float = 0.0
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    @property
    def measures_bos(self) -> bool:
        """Whether a run measures the model to choose how samples begin."""
        return self.bos is not None and not self.bos.decided


def make_plan(
    model: str,
    config: PruneConfig,
    calibration: Calibration,
    options: RunOptions,
    device: torch.device,
    dtype: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plans the run of :func:`ace_ext.runs.pipeline.prune_folder` with the same arguments, in one process.

    The model may also be one without files (:mod:`ace_ext.runs.shapes_only`). The peak includes what the calling
    process already holds, so call it from a fresh process. On a GPU the peak is that of torch's allocations there (the
    formulas were compared with measurements on CPUs only). ``tell`` is called with a line if the trial will take long.

    Raises:
        InputError: as the run would, except for weights that are not finite: no weight is checked.
    """
    request = RunRequest(model, config, calibration, options, device, dtype)
    check_request(request)
    calibration.check()
    source = open_for_plan(request)
    smaller = None if config.remove is None else smaller_of(source, config, rehearse=True)
    if smaller is None:
        check_pattern(source.blocks, config)
    check_tables(source.model, config)
    check_serves(source, request)
    format_named(options.format).check_model(source.model, source.blocks, config.method.grid)
    measured = _draw(source, request)
    distills = config.method.distill is not None and predicts_tokens(source.model)
    if distills and not source.shapes_only and calibration.reads_text:
        check_text(request, source)
    chain = calibration.reads_text and _is_chain_of_text(source, config)
    request = measured.request
    calibration = request.calibration
    demand = Demand(source, request)
    choice = demand.decide()
    need = _needed(source, request) if source.shapes_only else {}
    before = demand.peak(choice)  # of which the process's part is estimated
    trial, untried = None, _untried(chain)
    if chain and (not source.shapes_only or _can_try(source, request)):
        if (size := size_of(source.blocks[0])) >= LARGE_BLOCK:
            tell(f"pruning one block of {size / 1e6:,.0f} million weights with a few tokens, to estimate the time")
        try:
            tried = config.without_distillation() if config.ends_smaller else config  # `distill` alone has no mask
            trial = try_block(source, measured.tokens, tried, device, keeps_forwards=choice.forwards)
        except UnseenExpertError:
            untried = "for a mixture whose matrices are compared with each other: a few tokens do not reach all experts"
        except Exception as error:  # a class's code may not run with one block alone
            untried = _not_walked(source, measured.tokens, request, error)
    measurable = device.type != "cuda" and not source.shapes_only
    pruning = demand.peak(choice, resident_bytes()) if measurable else before
    phases = [pruning]
    if device.type == "cpu":
        phases += _earlier_phases(source, pruning, calibration, measured)
    if distills:
        phases.append(replace(needed_memory(request, source), phase="distill"))
    read, written = _traffic(source, calibration, 0 if choice.hidden or trial is None else trial.passes)
    if source.offloaded:  # for each forward pass of the whole model
        read += (2 * request.evaluates + measured.measures_bos) * bytes_of_all(source)
    matrices = [] if config.ends_smaller else planned_matrices(smaller.blocks if smaller else source.blocks, config)
    stays = source if smaller is None else replace(source, model=smaller.model, blocks=smaller.blocks)
    output = output_bytes(stays, matrices, options.format, config)
    if options.format != DEFAULT_FORMAT:  # the dense files are hashed and packed, and what they became is compared
        read, written = read + 2 * bytes_of_all(source) + output, written + output
    return Plan(
        model=model,
        device=str(device),
        dtype=str(next(iter(source.blocks[0].module.parameters())).dtype).removeprefix("torch."),
        matrices=matrices,
        blocks=len(stays.blocks),
        dense=[] if config.ends_smaller else stay_dense(stays.model, stays.blocks),
        offload=source.offloaded,
        resident_hidden=choice.hidden,
        phases=phases,
        read_bytes=read,
        write_bytes=written,
        output_bytes=output,
        output_estimate=is_estimate(options.format, config),
        seconds={} if trial is None else _seconds(request, source, trial, measured, read + written),
        bos=measured.bos,
        trial="" if trial is None else _describe(source, device),
        untried="" if trial is not None else untried,
        need=need,
        removed=[] if smaller is None else smaller.removed,
        estimate="" if smaller is None else smaller.estimate,
    )


def _is_chain_of_text(source: Source, config: PruneConfig) -> bool:
    """Whether the time follows from one block: there is one list of blocks that text enters first, and the whole model
    is not trained after them."""
    if predicts_tokens(source.model):
        return True
    lists = {list_of(block) for block in source.blocks}
    return len(lists) == 1 and main_input(source.model) == "input_ids" and config.method.distill is None


def _untried(chain: bool) -> str:
    """Why there is no trial."""
    if not chain:
        return "for encoders with distill, models with several lists of blocks, and calibration that is no text"
    return "without the model's files; too little memory is free here to try a block of its size"


def _not_walked(source: Source, tokens: Tensor, request: RunRequest, error: Exception) -> str:
    """Why there is no trial of a model whose trial ended with an error, if a run would not walk it block by block.

    Raises:
        InputError: the run would refuse it.
        Exception: ``error``, if the run would walk it.
    """
    try:
        reason = not_walked(source, tokens, request.device)
    except InputError as refused:
        raise error if isinstance(error, InputError) else refused from None
    if reason is None:
        raise error
    hindered = {
        "leave out --offload disk": source.offloaded,
        "leave out --save-stats": request.options.save_stats is not None,
    }
    check_whole_forwards(source.model, request.config, reason, hindered)
    return f"for a model that cannot be walked block by block: {reason}"


def _describe(source: Source, device: torch.device) -> str:
    """What a trial was made on."""
    weights = "random weights; files are not counted" if source.shapes_only else "a few tokens"
    threads = torch.get_num_threads()
    where = str(device) if device.type == "cuda" else f"{threads} {'thread' if threads == 1 else 'threads'} of this CPU"
    return f"one block with {weights}; on {where}"


def _needed(source: Source, request: RunRequest) -> dict[str, int]:
    """Peak bytes of a run with all weights in memory, and with one block at a time if that is possible. The model
    cannot then write its own text, so another one is assumed."""
    distills = request.config.method.distill is not None
    least = needed_memory(request, source).total if distills else 0
    found = {"whole": max(least, Demand(replace(source, offloaded=False), request).peak(MemoryChoice()).total)}
    if not request.config.comparison.over_matrices and request.config.remove is None:
        text = replace(request.calibration, source=SMALL_SOURCES[0]) if request.writes_own_text else request.calibration
        given = replace(request, calibration=text)
        peak = Demand(replace(source, offloaded=True), given).peak(MemoryChoice(hidden=False))
        found["offload"] = max(least, peak.total)
    return found


def _can_try(source: Source, request: RunRequest) -> bool:
    """Whether a block with random weights can be pruned in the memory that is free."""
    few = replace(request.calibration, nsamples=min(8, request.calibration.nsamples), source=SMALL_SOURCES[0])
    block = Demand(replace(source, offloaded=True), replace(request, calibration=few)).peak(MemoryChoice(), 0)
    largest = max(parameter.numel() for parameter in source.model.parameters())
    return block.total + 2 * 4 * largest <= available_bytes()  # random numbers are drawn in float32


def planned_matrices(blocks: list[Block], config: PruneConfig) -> list[PlannedMatrix]:
    """Shape, comparison group and number of weights to keep of every matrix, in the order of the run."""
    linears = [(block.full_name(child), linear) for block in blocks for child, linear in block.linears.items()]
    whole = sum(linear.weight.numel() for _, linear in linears)
    group = config.comparison
    found = []
    for name, linear in linears:
        rows, cols = linear.weight.shape
        size = whole if group.over_matrices else group.size(rows, cols)
        keep = keep_count(whole, config.sparsity) if group.over_matrices else group.keep(rows, cols, config.sparsity)
        found.append(PlannedMatrix(name, (rows, cols), str(group), size, keep))
    return found


def _draw(source: Source, request: RunRequest) -> _Measured:
    """Draws the calibration samples as a run does and measures the cost. Random tokens are used if the model would
    write the samples itself, or if there is no tokenizer. If the model would be measured for the BOS token, the samples
    are without the token and have the same length."""
    calibration = request.calibration
    if isinstance(calibration, InputCalibration):
        bos = None
    elif source.shapes_only:
        bos = undecided_bos(calibration.bos)
    else:
        bos = calibration.choose_bos(source.tokenizer, None if predicts_tokens(source.model) else source.model)
    measured = _Measured(bos, request, before_text=resident_bytes())
    if bos is not None and (calibration.source == SELF or source.shapes_only):
        vocabulary = embedding_weight(source.model).shape[0]
        measured.tokens = torch.randint(0, vocabulary, (calibration.nsamples, calibration.seqlen))
        return measured
    start = time.perf_counter()
    reset_peak()
    if isinstance(calibration, InputCalibration):
        measured.request = sized(request, source, calibration.read(source.files.folder))
    else:
        measured.tokens = calibration.load(source.tokenizer, None, bos).tokens
    measured.text_bytes = max(0, peak_memory_bytes() - measured.before_text)
    measured.text_seconds = time.perf_counter() - start
    return measured


def _earlier_phases(source: Source, pruning: Estimate, calibration: Calibration, measured: _Measured) -> list[Estimate]:
    """The phases before pruning: loading the model and drawing text."""
    phases = []
    if source.unpacking is not None:
        peak = source.unpacking.peak_bytes
        phases.append(Estimate(measured.before_text, pruning.model, transient=peak, phase="load"))
    if calibration.source == SELF:
        text = _writing_bytes(source.model, calibration)
        phases.append(Estimate(pruning.process, pruning.model, transient=text, phase="text"))
        return phases
    if source.shapes_only:
        return phases
    loaded = 0 if source.offloaded else pruning.model
    if source.files.shards is not None and not source.offloaded and not measured.measures_bos:
        # With mapped files, only the blocks have been read by then (to check their weights).
        loaded = _bytes_of(source.blocks) + copied_bytes(source.blocks, source.files.shards)
    return [*phases, Estimate(measured.before_text, loaded, transient=measured.text_bytes, phase="text")]


def _writing_bytes(model: nn.Module, calibration: Calibration) -> int:
    """Bytes of the key and value cache for the samples that are generated together, and four float64 copies of their
    logits."""
    text = text_config(model)
    rows = min(ROWS_TOGETHER, calibration.nsamples)
    attention = getattr(text, "num_attention_heads", 0)  # 0 in a model without attention
    size = getattr(text, "head_dim", None) or text.hidden_size // max(1, attention)
    heads = getattr(text, "num_key_value_heads", None) or attention
    cache = 2 * text.num_hidden_layers * heads * size * calibration.seqlen * rows
    embedding = embedding_weight(model)
    return int(cache) * embedding.dtype.itemsize + 4 * 8 * rows * len(embedding)


def _bytes_of(blocks: list[Block]) -> int:
    return sum(p.nbytes for block in blocks for p in block.module.parameters())


def _traffic(source: Source, calibration: Calibration, hidden_reads: int) -> tuple[int, int]:
    """Bytes read and written: the copies of the model's files, each pruned block, and the hidden states. A run writes
    these for ``--resume`` and reads them ``hidden_reads`` times per block."""
    blocks = source.blocks
    shape = ModelShape.of(source.model, blocks)
    hidden = calibration.nsamples * calibration.seqlen * shape.hidden * shape.itemsize
    whole, inside = sum(p.nbytes for p in source.model.parameters()), _bytes_of(blocks)
    files = whole if source.shapes_only else sum(file.stat().st_size for file in source.files.paths)
    mapped = source.files.shards is not None or source.shapes_only
    loaded = whole if mapped else 0  # copying the files does not load them
    if source.offloaded:
        loaded += _bytes_of(blocks[:1]) + whole  # to capture arguments, and to try the model
    return files + loaded + hidden * len(blocks) * hidden_reads, whole + inside + hidden * (len(blocks) + 1)


def _seconds(request: RunRequest, source: Source, trial: Trial, measured: _Measured, traffic: int) -> dict[str, float]:
    blocks, calibration = len(source.blocks), request.calibration
    tokens = calibration.nsamples * calibration.seqlen
    text, forward = measured.text_seconds, _forward_seconds(source, trial)
    distilled = None if request.config.method.distill is None else text_of(request)
    if calibration.source == SELF:
        samples = [calibration.nsamples, *([distilled.nsamples] if distilled else [])]
        steps = sum(math.ceil(count / ROWS_TOGETHER) for count in samples) * calibration.seqlen
        text = steps * blocks * trial.step_seconds
    if measured.measures_bos:
        text += 2 * WINDOWS * WINDOW_TOKENS * forward
    if request.evaluates:  # before and after
        text += 2 * holdout.WINDOWS * holdout.WINDOW_TOKENS * forward
    found = {
        "load": source.unpacking.seconds if source.unpacking else 0.0,
        "text": text,
        "blocks": blocks * (trial.fixed_seconds + tokens * trial.token_seconds),
    }
    if request.config.remove is not None:
        found["remove"] = removal_seconds(source, request.config.remove, tokens, trial.token_seconds)
    if request.config.ends_smaller:
        del found["blocks"]
    if not source.shapes_only:
        found["files"] = traffic / _bytes_per_second(source.files.paths[0])
    if distilled is not None:
        settings, batches = planned_batches(request)
        step = try_step(source, settings, calibration.seqlen, request.device)
        found["distill"] = step.seconds(steps_of(batches, settings))
    return found


def _forward_seconds(source: Source, trial: Trial) -> float:
    """Of a token through the whole model. The head takes as long as so many weights of the blocks."""
    head = embedding_weight(source.model).numel() if predicts_tokens(source.model) else 0
    return trial.forward_seconds * len(source.blocks) * (1 + head / sum(map(size_of, source.blocks)))


def _bytes_per_second(file: Path) -> float:
    """Read speed of the model's files, measured on up to 64 MiB of one. Writing is assumed to be as fast."""
    start = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        count = len(opened.read(2**26))
    return max(1, count) / max(1e-6, time.perf_counter() - start)
