"""The memory that a run will need, computed from shapes alone.

The factors are counted from the code that allocates the memory, and compared with measured peaks:
``benchmarks/plan_accuracy.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ace_ext.data.bos import WINDOW_TOKENS, WINDOWS
from ace_ext.engine.model_shape import ModelShape
from ace_ext.engine.strategies import RunSizes, StrategyBytes, planned
from ace_ext.models._transformers import predicts_tokens
from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import Shards
from ace_ext.process_memory import resident_bytes
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.prune_linear import working_bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run needs at the peak of one of its phases, by use."""

    process: int = 0  # the interpreter, its libraries, tokenizer and calibration text
    model: int = 0  # weights that are read; with offload those of one or three blocks, in "enter" the embedding too
    hidden: int = 0  # hidden states that stay in memory
    forward: int = 0  # activations of one batch in one block
    statistics: int = 0  # of the Linears that are collected together, with sample rows and Gram matrices
    solver: int = 0  # working memory of pruning the largest Linear
    training: int = 0  # a block's weights in float32, their gradients and moments, and one step's activations
    transient: int = 0  # temporary memory of loading the model or of drawing text
    phase: str = "prune"

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by use."""
        return {name: size for name, size in vars(self).items() if name != "phase"}

    def describe(self) -> str:
        """The parts of at least 1 MiB, largest first, in one line."""
        parts = {name: size for name, size in self.parts().items() if size >= 2**20}
        return ", ".join(f"{n} {s / 1e9:.2f} GB" for n, s in sorted(parts.items(), key=lambda part: -part[1]))


def estimate(
    model: nn.Module,
    blocks: list[Block],
    shards: Shards | None,
    config: PruneConfig,
    nsamples: int,
    seqlen: int,
    *,
    offload: bool,
    resident_hidden: bool = True,
    keeps_forwards: bool = False,
    overlap: bool = False,
    whole: bool = False,
    measures: bool = False,
    stored: Sequence[int] | None = None,
    process: int | None = None,
    device: torch.device | str = "cpu",
) -> Estimate:
    """The memory of a run at its peak, from shapes alone: the estimate of the largest phase.

    Args:
        model: loaded, or a skeleton with the dtypes that it will have.
        blocks: its blocks.
        shards: its files if the weights are mapped into memory from them without conversion; else None.
        config: what to prune and how.
        nsamples: calibration samples.
        seqlen: tokens of a sample.
        offload: only one block at a time is in memory.
        resident_hidden: all hidden states are in memory.
        keeps_forwards: several batches are pruned in lockstep, and the tensors of their unfinished forwards are kept.
        overlap: with ``offload``, a block is pruned while the next one is read and the last one written.
        whole: every weight is read, as when the model writes its own calibration text.
        measures: the run has a forward pass of the whole model, to decide about the BOS token
            (:mod:`ace_ext.data.bos`) or to measure perplexity (:mod:`ace_ext.runs.holdout`).
        stored: bytes of each block's statistics in a file, if they come from there; no token passes the model then.
        process: bytes that the process uses besides the model; None: estimated from this process.
        device: whose memory is estimated.
    """
    shape = ModelShape.of(model, blocks)
    mapped = shards is not None and not whole and torch.device(device).type == "cpu"
    partly = mapped and not measures  # neither the head nor most of the embedding is read
    outside = shape.embedding + (0 if partly or offload else shape.head)
    if partly and not offload:  # only the pages around the tokens' embedding rows are read
        outside = min(outside, nsamples * seqlen * _FAULT_AROUND)
    loaded = not next(blocks[0].module.parameters()).is_meta
    resident = sum(shape.blocks) + outside
    if shards is not None and mapped and not offload:
        resident += copied_bytes(blocks, shards)
    if process is None:
        process = process_bytes(
            resident if loaded else 0, text_to_come=not (loaded or offload or stored is not None), device=device
        )
    if shape.experts and shape.itemsize < 4 and torch.device(device).type == "cpu":
        process += _EXPERT_KERNELS
    tokens = nsamples * seqlen
    batch = min(tokens, config.batch_samples(seqlen) * seqlen)
    sizes = RunSizes(blocks, shape, tokens, batch, seqlen, config.needs.prune, stored)
    strategy = planned(config, batch == tokens, keeps_forwards, stored is not None)
    run = _Run(sizes, config, resident_hidden, strategy.memory(sizes))
    if torch.device(device).type == "cpu":  # on a GPU, unfinished forwards take memory only for tensors
        process += run.strategy.stacks
    phases = [*run.pruning(), *run.training(), *run.allocating()]
    block_bytes = max(shape.blocks) * (3 if overlap else 1)
    phases = [replace(phase, process=process, model=block_bytes if offload else resident) for phase in phases]
    if offload and stored is None:
        phases.append(
            replace(run.entering(), process=process, model=max(shape.blocks) * (2 if overlap else 1) + outside)
        )
    if config.method.distill is not None and not predicts_tokens(model):
        phases.append(replace(run.distilling(), process=process, model=2 * resident))
    if measures:
        forward, judging = run.measuring()
        largest = max(*shape.blocks, shape.embedding, shape.head)
        phases.append(replace(forward, process=process, model=largest if offload else resident))
        phases.append(replace(judging, process=process, model=0 if offload else resident))
    return max(phases, key=lambda phase: phase.total)


_FAULT_AROUND = 2**16
"""Bytes of a mapped file that Linux reads when one page is accessed."""

_FORWARD_LIBRARIES = 110 * 10**6
"""Measured: lasting growth of the process in its first forward pass (oneDNN's kernels, torch's code)."""

_TOKENIZER_AND_TEXT = 150 * 10**6
"""Measured on wiki-mini with a vocabulary of 49 152: lasting growth of the process when it draws calibration text."""

_EXPERT_KERNELS = 100 * 10**6
"""Measured: lasting growth of the process with experts, whose matrix products have many different row counts."""


def copied_bytes(blocks: list[Block], shards: Shards) -> int:
    """Bytes of fused experts that were assembled from several tensors; the mapped originals stay in memory too."""
    fused = ((block.name, experts) for block in blocks for experts in block.experts)
    return sum(experts.tensor.nbytes for name, experts in fused if f"{name}.{experts.name}" not in shards.entries)


def process_bytes(weights: int, text_to_come: bool, device: torch.device | str) -> int:
    """Bytes that the process will use besides the model, from what it uses now. ``weights`` bytes of the latter are the
    model."""
    if torch.device(device).type == "cuda":
        return 0
    later = _FORWARD_LIBRARIES + (_TOKENIZER_AND_TEXT if text_to_come else 0)
    return max(0, resident_bytes() - weights) + later


@dataclass(frozen=True)
class _Run:
    """The phases of a run, without the parts ``process`` and ``model``."""

    sizes: RunSizes
    config: PruneConfig
    resident_hidden: bool
    strategy: StrategyBytes

    @property
    def states(self) -> int:
        """Bytes of all hidden states between two blocks."""
        sizes = self.sizes
        return sizes.tokens * sizes.shape.hidden * sizes.shape.itemsize if sizes.stored is None else 0

    @property
    def kept(self) -> int:
        """Bytes of hidden states that are in memory between two blocks."""
        return self.states if self.resident_hidden else 0

    @property
    def _parts(self) -> int:
        """The number of lists of blocks; 0 for one. Training holds the dense model's states before each."""
        lists = len({block.name.rpartition(".")[0] for block in self.sizes.blocks})
        return 0 if lists == 1 else lists

    @property
    def _other_parts(self) -> int:
        """Bytes of the states of another part that a part reads, such as a decoder an encoder's output."""
        return self.states if self._parts else 0

    @property
    def hidden(self) -> int:
        """Bytes of hidden states while a block is pruned. Training also holds all inputs and all dense outputs."""
        if self.config.method.train is None:
            return self.kept + self._other_parts
        return self.kept + self._other_parts + (2 + self._parts) * self.states

    def entering(self) -> Estimate:
        """Entering the blocks: the first batch runs through a block before the states of later batches exist."""
        forward = self.sizes.forward()
        return Estimate(hidden=max(0, self.kept - forward), forward=forward, phase="enter")

    def measuring(self) -> tuple[Estimate, Estimate]:
        """Deciding about the BOS token: the forward pass up to the logits of all its tokens, and then the loss of one
        window, with its logits twice in float32."""
        shape, seqlen = self.sizes.shape, WINDOW_TOKENS + 1
        tokens = 2 * WINDOWS * seqlen
        logits = shape.vocabulary * tokens * shape.itemsize
        forward = shape.forward_bytes(tokens, seqlen, frozenset())
        return (
            Estimate(forward=forward, transient=logits + shape.converted_head_bytes(tokens), phase="bos"),
            Estimate(transient=logits + shape.vocabulary * seqlen * 8, phase="bos"),
        )

    def pruning(self) -> list[Estimate]:
        """Collecting statistics, and pruning a matrix."""
        linears = [linear for block in self.sizes.blocks for linear in block.linears.values()]
        solver = max(working_bytes(self.config, *linear.weight.shape) for linear in linears)
        statistics, hidden = self.strategy.statistics, self.hidden
        return [
            Estimate(hidden=hidden, forward=self.strategy.forward, statistics=statistics),
            Estimate(hidden=hidden, forward=self.strategy.pending, statistics=statistics, solver=solver),
        ]

    def distilling(self) -> Estimate:
        """Distillation of a network by whole forwards: all float32 copies with their moments, gradients in the model's
        dtype, and the activations of a step in all blocks."""
        from ace_ext.healing.settings import HealSettings  # imported here: most methods do not distil
        from ace_ext.healing.trainer import STATE_BYTES

        sizes = self.sizes
        trained = sum(linear.weight.numel() for block in sizes.blocks for linear in block.linears.values())
        step = max(HealSettings().step_tokens, sizes.seqlen)
        activations = len(sizes.blocks) * sizes.shape.training_bytes(step, sizes.seqlen)
        logits = 3 * 4 * step * sizes.shape.vocabulary
        state = trained * (STATE_BYTES + 2 * sizes.shape.itemsize)
        return Estimate(training=state + activations + logits, phase="distill")

    def training(self) -> list[Estimate]:
        """Training a block, with its inputs and targets."""
        if self.config.method.train is None:
            return []
        from ace_ext.engine.block_training import training_bytes  # imported here: most methods do not train

        return [Estimate(hidden=self.hidden, training=training_bytes(self.config.method, self.sizes), phase="train")]

    def allocating(self) -> list[Estimate]:
        """The extra pass that measures each block for sparsity allocation, with its own hidden states."""
        if self.config.method.allocate is None:
            return []
        from ace_ext.engine.sparsity_pass import measuring_bytes  # imported here: most methods do not allocate

        statistics, scores = measuring_bytes(self.config, self.sizes)
        forward = self.sizes.forward(self.config.needs.measure)
        hidden = 2 * self.kept
        return [
            Estimate(hidden=hidden, forward=forward, statistics=statistics, phase="allocate"),
            Estimate(hidden=hidden, statistics=statistics, solver=scores, phase="allocate"),
        ]
