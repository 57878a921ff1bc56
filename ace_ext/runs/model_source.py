"""Opens the model of a run, and decides what stays in memory.

The model is loaded whole, or as a skeleton whose weights stay in their files. ``run`` and ``plan`` use the same
function, so they decide the same.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ace_ext.data.requests import check_positions, check_predicts, sample_count
from ace_ext.engine.model_shape import ModelShape
from ace_ext.errors import InputError
from ace_ext.fingerprint import fingerprint_of_files, fingerprint_of_model, weight_files
from ace_ext.formats import DenseModel, format_named
from ace_ext.models._transformers import decoder_of, main_input, predicts_tokens, token_embedding
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.loading import WEIGHT_DTYPES, load_model, load_tokenizer, local_folder
from ace_ext.models.parts import check_removable, most_tokens
from ace_ext.models.safetensors_files import Shards, has_safetensors
from ace_ext.models.skeleton import Unpacking, check_all_read, dtype_of, skeleton
from ace_ext.models.tokenizer import Tokenizer
from ace_ext.process_memory import available_bytes, resident_bytes
from ace_ext.runs.memory_model import Estimate, estimate
from ace_ext.runs.options import RunRequest


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's weights."""

    name: str
    folder: Path | None
    """The model's folder on this machine, if it has one."""
    shards: Shards | None
    """Its safetensors files, if they hold the weights exactly as the output will. They can then be copied and patched.
    Else None."""

    @property
    def paths(self) -> list[Path]:
        """The files that hold the weights."""
        if self.folder is None:
            return [Path(self.name).expanduser()]
        if self.shards is not None:
            return self.shards.files
        return weight_files(self.folder)

    @property
    def described(self) -> dict[str, str]:
        """The hashes of the weights' files, the configuration and the model's own Python code by name, for a
        fingerprint."""
        if self.folder is None:
            return fingerprint_of_files(self.paths)
        return fingerprint_of_model(self.folder, self.paths)


@dataclass
class Source:
    """The model of a run: loaded, or a skeleton whose weights stay in files."""

    model: nn.Module
    tokenizer: Tokenizer
    blocks: list[Block]
    files: ModelFiles
    offloaded: bool = False
    """Whether one block at a time is read from the files."""
    unpacking: Unpacking | None = None
    """The cost of loading, if nothing was loaded (for a plan) and the files' weights must be converted."""
    shapes_only: bool = False
    """Whether there are neither weights nor a tokenizer (for a plan: :mod:`ace_ext.runs.shapes_only`)."""

    @property
    def dense(self) -> DenseModel:
        """The parts that an output format reads."""
        return DenseModel(self.model, self.tokenizer, self.blocks, self.files.folder, self.files.shards)


def open_source(request: RunRequest, *, weights: bool = True) -> Source:
    """Loads the model, or builds its skeleton if its weights stay in their files.

    Args:
        request: names the model, and whether to offload.
        weights: False loads no weight: a plan needs only shapes.

    Raises:
        InputError: it cannot be loaded, it has no blocks to prune, or its files do not allow ``offload``.
    """
    folder = local_folder(request.model)
    if folder is None or not has_safetensors(folder):
        if request.options.offload == "disk":
            raise _no_safetensors(request.model)
        files = ModelFiles(request.model, folder, None)
        if not files.paths:
            raise InputError(f"model {request.model!r} has no weights; give a folder with safetensors files")
        return _loaded(request, files) if weights else _planned(request, files)
    shards = Shards(folder)
    laid_out = skeleton(folder, shards, request.dtype, causal=False)
    # The plan of a network is of its files as they stand: nothing else says that config.json is its own.
    check_all_read(laid_out, shards, request.model, strict=not weights and not predicts_tokens(laid_out))
    stored = _stored_as_loaded(laid_out, shards, request.dtype)
    files = ModelFiles(request.model, folder, shards if stored else None)
    if stored:
        blocks = find_blocks(
            laid_out,
            request.config.skip,
            check=False,
            max_dense=request.config.dense_limit,
            towers=request.config.towers,
        )
        offload = wants_offload(laid_out, blocks, shards, request)
        if offload or not weights:
            return Source(
                laid_out,
                load_tokenizer(folder, needed=not weights and _draws_text(laid_out, request)),
                blocks,
                files,
                offload,
            )
    if request.options.offload == "disk":
        raise _files_do_not_serve(request.model, request.dtype)
    return _loaded(request, files) if weights else _planned(request, files, laid_out)


def is_network(request: RunRequest) -> bool:
    """Whether the model of a run is no causal language model. False if it cannot be opened."""
    if not request.calibration.reads_text:
        return True
    try:
        folder = local_folder(request.model)
        return folder is not None and not predicts_tokens(skeleton(folder, None, request.dtype, causal=False))
    except InputError:
        return False


def _loaded(request: RunRequest, files: ModelFiles) -> Source:
    where = request.model if files.folder is None else str(files.folder)
    loaded = load_model(where, request.dtype, request.device, causal=False)
    return Source(
        loaded.model,
        loaded.tokenizer,
        find_blocks(
            loaded.model, request.config.skip, max_dense=request.config.dense_limit, towers=request.config.towers
        ),
        files,
    )


def _planned(request: RunRequest, files: ModelFiles, laid_out: nn.Module | None = None) -> Source:
    """The skeleton of a model that a run would load whole."""
    if files.folder is None:
        from ace_ext.models.gguf import gguf_skeleton  # imported here: only plans for such a file need it

        wanted = WEIGHT_DTYPES.get(request.dtype, torch.bfloat16)
        laid_out, tokenizer, unpacking = gguf_skeleton(files.paths[0], wanted)
    else:
        laid_out = laid_out or skeleton(files.folder, None, request.dtype, causal=False)
        tokenizer = load_tokenizer(files.folder, needed=_draws_text(laid_out, request))
        # Tensors are converted one at a time while the files are mapped.
        unpacking = Unpacking(sum(file.stat().st_size for file in files.paths), 0.0)
    blocks = find_blocks(
        laid_out, request.config.skip, check=False, max_dense=request.config.dense_limit, towers=request.config.towers
    )
    return Source(laid_out, tokenizer, blocks, files, unpacking=unpacking)


def _draws_text(model: nn.Module, request: RunRequest) -> bool:
    """Whether a plan draws text. A model that reads none is refused for that, not for the tokenizer that it lacks."""
    return request.calibration.reads_text and (predicts_tokens(model) or main_input(model) == "input_ids")


def _no_safetensors(model: str) -> InputError:
    """The error for ``offload="disk"`` if the model is not a folder of safetensors."""
    return InputError(f"offload disk needs a folder or hub model of safetensors (got {model!r}); pass --offload none")


def _files_do_not_serve(model: str, dtype: str) -> InputError:
    """The error for ``offload="disk"`` if :func:`_stored_as_loaded` is False."""
    return InputError(
        f"offload disk needs safetensors that store every parameter unchanged in dtype {dtype}, and "
        f"{model!r} has none; save it with save_pretrained, or pass --offload none"
    )


def _stored_as_loaded(laid_out: nn.Module, shards: Shards, dtype: str) -> bool:
    """Whether the files hold every parameter as it is: contiguous, in its shape and in the requested dtype."""
    wanted = dtype_of(laid_out.config, shards, dtype)
    embedding = _embedding_name(laid_out) if predicts_tokens(laid_out) else None  # is read by its own name
    stored = {id(p) for name, p in laid_out.named_parameters(remove_duplicate=False) if name in shards}
    for name, parameter in laid_out.named_parameters(remove_duplicate=False):
        if name not in shards:
            if name == embedding or id(parameter) not in stored:
                return False
            continue  # tied to one that is there
        found, shape = shards.describe(name)
        if found not in (parameter.dtype, wanted) or shape != tuple(parameter.shape):  # some always load as float32
            return False
    return getattr(laid_out.config, "quantization_config", None) is None


def _embedding_name(model: nn.Module) -> str | None:
    """The name of the weight of the input embedding; None if there is none."""
    embedding = token_embedding(model)
    return next((f"{name}.weight" for name, module in model.named_modules() if module is embedding), None)


def wants_offload(laid_out: nn.Module, blocks: list[Block], shards: Shards | None, request: RunRequest) -> bool:
    """``disk``: yes; ``none``: no; ``auto``: yes if the whole run would not fit into the budget or the device."""
    if request.options.offload != "auto":
        return request.options.offload == "disk"
    if request.config.comparison.over_matrices or request.writes_own_text or request.config.remove is not None:
        return False
    if request.config.method.distill is not None and not predicts_tokens(laid_out):
        return False
    nsamples, seqlen = request.calibration.nsamples, request.calibration.seqlen
    measures = request.evaluates or request.measures_bos()  # or may do so: the tokenizer is not loaded yet
    whole = estimate(
        laid_out,
        blocks,
        shards,
        request.config,
        nsamples,
        seqlen,
        offload=False,
        measures=measures,
        stored=request.stored,
    )
    return whole.total > budget_of(request)


def check_serves(source: Source, request: RunRequest) -> None:
    """Checks that the model can do what the run asks of it. Call it before the work.

    Raises:
        InputError: it has too few positions for the samples, or no LM head although it is to write text or to be
            distilled; or a network that is no causal language model is to be distilled after a removal.
    """
    if request.options.stats is None:
        if request.calibration.reads_text:
            _check_reads_text(source, request)
        elif predicts_tokens(source.model):
            _check_needs_no_text(request)
    if request.writes_own_text:
        check_predicts(source.model, "it cannot write calibration text: give another --calibration, such as a file")
    if request.config.remove is not None:
        check_removable(source.model, source.blocks)
        if request.config.method.distill is not None and not predicts_tokens(source.model):
            raise InputError(
                f"distill after remove takes models that predict the next token (got {type(source.model).__name__}); "
                "leave one of them out"
            )
    if request.config.method.distill is not None:
        if predicts_tokens(source.model):
            check_predicts(source.model, "distill trains on its predictions: leave it out")
        elif source.offloaded:
            raise InputError("distill of this kind of model needs it in memory: leave out --offload disk")


def _check_needs_no_text(request: RunRequest) -> None:
    """Checks what images or sound with text cannot do for a language model."""
    found = f"and calibration {request.calibration.source!r} has images or sound"
    if request.config.remove is not None:
        raise InputError(f"remove is calibrated on text, {found}: give a text")
    if request.config.method.distill is not None:
        raise InputError(
            f"distill trains a language model on text, {found}: leave it out, and heal the output, ace-prune heal DIR "
            "--calibration TEXT"
        )


def _check_reads_text(source: Source, request: RunRequest) -> None:
    """Checks that text can calibrate the model, and that it has enough positions."""
    model = source.model
    if not predicts_tokens(model) and main_input(model) != "input_ids":
        raise InputError(
            f"model {request.model!r} reads {main_input(model)} ({type(model).__name__}), so text does not calibrate "
            "it: give --calibration with what it reads"
        )
    check_positions(model, request.calibration.seqlen // (1 if decoder_of(model) is None else 2))


def sized(request: RunRequest, source: Source, batches: list[dict[str, Tensor]]) -> RunRequest:
    """A request with the samples of these batches, and with the most tokens that a block of the model gets of one."""
    tokens = most_tokens(source.model, [block.name for block in source.blocks], batches[0])
    text = request.calibration
    return replace(request, calibration=replace(text, nsamples=sample_count(batches), seqlen=tokens or text.seqlen))


def budget_of(request: RunRequest) -> int:
    """Bytes that a run may use: its limit, or what the device or the system can give."""
    if request.options.max_memory is not None:
        return request.options.max_memory
    return available_bytes(request.device)


@dataclass(frozen=True)
class MemoryChoice:
    """What a run keeps in memory because it fits. Each field makes the run faster; none changes a byte of the
    output."""

    hidden: bool = True
    """All hidden states; False: they are in files."""
    forwards: bool = False
    """The activations of unfinished forwards of all batches. Each block then takes one forward pass."""
    overlap: bool = False
    """With offload: the previous and the next block. The first is written and the other read while a block is
    pruned."""


PACKING_COPIES = 4
"""Copies of the largest tensor that are in memory while it is packed and the written file is compared (measured on
SmolLM2-135M: 3.6 for the archive, 1.2 for the bitmap)."""
COMPARED_COPIES = 6
"""Float32 copies of one sample's logits while the predictions of two models are compared."""


@dataclass(frozen=True)
class Demand:
    """The memory that a run needs."""

    source: Source
    request: RunRequest

    def peak(self, choice: MemoryChoice, process: int | None = None) -> Estimate:
        """:func:`ace_ext.runs.memory_model.estimate` for this run; ``process`` as there."""
        tokenizer = None if self.source.shapes_only else self.source.tokenizer
        pruning = estimate(
            self.source.model,
            self.source.blocks,
            self.source.files.shards,
            self.request.config,
            self.request.calibration.nsamples,
            self.request.calibration.seqlen,
            offload=self.source.offloaded,
            resident_hidden=choice.hidden,
            keeps_forwards=choice.forwards,
            overlap=choice.overlap,
            whole=self.request.writes_own_text,
            measures=self.request.evaluates or self.request.measures_bos(tokenizer),
            stored=self.request.stored,
            process=process,
            device=self.request.device,
        )
        if self.request.config.remove is not None:
            pruning = max(pruning, self._removing(pruning), key=lambda phase: phase.total)
        if format_named(self.request.options.format).size is None or self.request.device.type != "cpu":
            return pruning
        largest = max(p.nbytes for p in self.source.model.parameters())
        packing = Estimate(pruning.process, pruning.model, transient=PACKING_COPIES * largest, phase="pack")
        return max(pruning, packing, key=lambda phase: phase.total)

    def _removing(self, pruning: Estimate) -> Estimate:
        """The removal of structures: hidden states, and the moments of one matrix's inputs, the neurons of a block at
        most. The matrix that reads them is one with as many rows as the hidden states have entries."""
        from ace_ext.structures.remove import working_bytes  # imported here: most runs remove no structure

        blocks, text = self.source.blocks, self.request.calibration
        shape, tokens = ModelShape.of(self.source.model, blocks), text.nsamples * text.seqlen
        batch = min(tokens, self.request.config.batch_samples(text.seqlen) * text.seqlen)
        shapes = [linear.weight.shape for block in blocks for linear in block.linears.values()]
        neurons = max((columns for rows, columns in shapes if rows == shape.hidden), default=shape.widest)
        wanted = self.request.config.remove
        read = (shape.hidden, neurons)
        experts = max(
            sum(linear.weight.shape == read for child, linear in block.linears.items() if block.is_expert(child))
            for block in blocks
        )
        cuts_experts = wanted is not None and wanted.takes_neurons
        moments, solver = working_bytes(neurons, shape.hidden, experts if cuts_experts else 0)
        linears = [linear.weight for block in blocks for linear in block.linears.values()]
        cut = sum(weight.nbytes for weight in linears if {neurons, 2 * neurons} & {*weight.shape})
        compares = wanted is not None and wanted.compares
        logits = COMPARED_COPIES * 4 * text.seqlen * shape.vocabulary if compares else 0
        return replace(
            pruning,
            model=pruning.model + cut * (1 + compares),  # those of the smaller model, at most; of the best one too
            hidden=tokens * shape.hidden * shape.itemsize,
            forward=shape.forward_bytes(batch, text.seqlen, frozenset()) + 8 * batch * (neurons + shape.hidden),
            statistics=moments,
            solver=solver,
            training=0,
            transient=logits,
            phase="remove",
        )

    def decide(self) -> MemoryChoice:
        """Chooses what fits, in this order: hidden states, neighbouring blocks, forwards.

        Raises:
            InputError: as :meth:`hidden_fits`.
        """
        choice = MemoryChoice(hidden=self.hidden_fits())
        overlap = replace(choice, overlap=True)
        choice = overlap if not self.source.offloaded or self._fits(overlap) else choice
        forwards = replace(choice, forwards=True)
        return forwards if choice.hidden and self._fits(forwards) else choice

    def _fits(self, choice: MemoryChoice) -> bool:
        """Whether the run fits into its limit. Without one, the limit is what this process uses already, plus three
        quarters of the free memory."""
        budget, device = self.request.options.max_memory, self.request.device
        if budget is None:
            own = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
            budget = own + available_bytes(device) * 3 // 4
        return self.peak(choice).total <= budget

    def hidden_fits(self) -> bool:
        """Whether the hidden states fit into memory together with the rest of the run.

        Raises:
            InputError: ``max_memory`` is too small for the run even with hidden states in files.
        """
        budget = self.request.options.max_memory
        if budget is None and not self.source.offloaded:
            return True
        if self.peak(MemoryChoice()).total <= budget_of(self.request):
            return True
        least = self.peak(MemoryChoice(hidden=False))
        if budget is not None and least.total > budget:
            mends = []
            if least.forward:
                mends.append("lower batch_tokens of collect")
            if not self.source.offloaded and self.request.config.remove is None:
                mends.append("pass --offload disk")
            enough = least.process < budget and mends
            raise InputError(
                f"max-memory must be at least {math.ceil(least.total / 1e6)}MB here "
                f"(got {budget / 1e6:.0f}MB): {least.describe()}; {', or '.join(mends) if enough else 'allow more'}"
            )
        return False
