"""What a run will need of memory, from shapes alone.

Factors are counted from the code they stand for and compared with measured peaks: ``benchmarks/plan_accuracy.py``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ace_ext.models._transformers import attends_eagerly
from ace_ext.models.blocks import Block
from ace_ext.models.safetensors_files import Shards
from ace_ext.process_memory import resident_bytes
from ace_ext.pruning.allocation import measure_needs
from ace_ext.pruning.block_tuning import step_samples
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, MOMENT
from ace_ext.pruning.statistics import StatisticsCollector


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run holds at the peak of one of its phases, by what holds them."""

    process: int = 0  # the interpreter, its libraries, tokenizer and calibration text
    model: int = 0  # weights that the run touches; with offload one block's and, at the entrance, what is before it
    hidden: int = 0  # hidden states that stay in memory
    forward: int = 0  # activations of one batch in one block
    statistics: int = 0  # of the Linears that are looked at together, their probes and Gram matrices included
    solver: int = 0  # what the largest Linear needs of the size of a matrix
    training: int = 0  # a block's weights in float32, their gradients and moments, and one step's activations
    transient: int = 0  # what loading or reading text holds for a moment
    phase: str = "prune"

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name != "phase"}

    def describe(self) -> str:
        """The parts that count, largest first."""
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
    whole: bool = False,
    process: int | None = None,
    device: torch.device | str = "cpu",
) -> Estimate:
    """What a run holds at its peak, from shapes alone: in whichever of its phases holds most.

    Args:
        model: loaded, or its skeleton with the dtypes that it will have.
        blocks: its blocks.
        shards: its files where the weights are used as they lie there, mapped into memory; else None.
        offload: one block at a time is in memory.
        resident_hidden: all hidden states are.
        whole: every weight is touched, as when the model writes its own calibration text.
        process: bytes beside the model; None: from what this process holds now.
        device: where the peak is asked for.
    """
    shape = _Shape.of(model, blocks)
    mapped = shards is not None and not whole and torch.device(device).type == "cpu"
    outside = shape.embedding + (0 if mapped or offload else shape.head)
    if mapped and not offload:  # a mapped file's pages are read around the rows that tokens ask for
        outside = min(outside, nsamples * seqlen * _FAULT_AROUND)
    loaded = not next(blocks[0].module.parameters()).is_meta
    resident = sum(shape.blocks) + outside
    if mapped and not offload:
        resident += copied_bytes(blocks, shards)
    if process is None:
        process = _process_bytes(resident if loaded else 0, text_to_come=not (loaded or offload), device=device)
    if shape.experts and shape.itemsize < 4 and torch.device(device).type == "cpu":
        process += _EXPERT_KERNELS
    run = _Run(blocks, config, shape, nsamples * seqlen, seqlen, resident_hidden)
    phases = [*run.pruning(), *run.training(), *run.allocating()]
    phases = [replace(phase, process=process, model=max(shape.blocks) if offload else resident) for phase in phases]
    if offload:
        phases.append(replace(run.entering(), process=process, model=max(shape.blocks) + outside))
    return max(phases, key=lambda phase: phase.total)


def solver_bytes(config: PruneConfig, rows: int, cols: int) -> int:
    """What pruning one matrix holds for a while beside its weights and statistics, the Gram matrix one of them.

    - A mask of its zeros, a byte each, and a callable's scores.
    - A solver: the dense weight in float32 and the mask; swaps, the error's gradient and its working copies of rows.
    - While the Gram matrix is factorised, three copies of it in float64; from then on ADMM's two factors in float32
      (the recursion's one) beside four buffers of the weight's size (two, and what a block of columns takes).
    """
    entries, square = rows * cols, cols * cols
    scores = 4 * entries if callable(config.metric) else 0
    if not config.solver:
        return entries + scores
    swaps = 12 * entries if config.refine else 0
    factorising = 25 * square if config.update else 0
    update = {None: 0, "admm": 8 * square + 18 * entries, "obs": 4 * square + 11 * entries}[config.update]
    return 5 * entries + scores + max(swaps, factorising, update)


_GRAMS = frozenset({GRAM, COSINE_GRAM})

_FAULT_AROUND = 2**16
"""Bytes of a mapped file that Linux brings in for one page that is touched."""

_HEAP_TENSOR = 2**25
"""Smaller tensors come from glibc's heap, and what is freed there may stay with the process."""

_FORWARD_LIBRARIES = 110 * 10**6
"""Measured: what the process grows by, for good, in its first forward pass (oneDNN's kernels, torch's code)."""

_TOKENIZER_AND_TEXT = 150 * 10**6
"""Measured on wiki-mini with a vocabulary of 49 152: what it grows by for good while it draws calibration text."""

_EXPERT_KERNELS = 100 * 10**6
"""Measured: what it grows by for good as experts' products come in ever new numbers of rows."""


def copied_bytes(blocks: list[Block], shards: Shards) -> int:
    """Of fused experts that were put together from several tensors of files that stay mapped beside them."""
    fused = ((block.name, experts) for block in blocks for experts in block.experts)
    return sum(experts.tensor.nbytes for name, experts in fused if f"{name}.{experts.name}" not in shards.entries)


def _process_bytes(weights: int, text_to_come: bool, device: torch.device | str) -> int:
    """What the process will hold beside the model, from what it holds now with ``weights`` bytes of the model."""
    if torch.device(device).type == "cuda":
        return 0
    later = _FORWARD_LIBRARIES + (_TOKENIZER_AND_TEXT if text_to_come else 0)
    return max(0, resident_bytes() - weights) + later


def _statistics_bytes(linear: nn.Linear, needs: frozenset[str], tokens: int) -> int:
    """Bytes of one Linear's statistics: two float64 vectors a state, the float32 cross moment and Gram matrix, and the
    probe: rows of its input, of its dense output, and of both outputs in float32."""
    rows, cols = linear.weight.shape
    moment = 4 * rows * cols if MOMENT in needs else 0
    gram = 4 * cols * cols if needs & _GRAMS else 0
    probes = min(tokens, StatisticsCollector.PROBE_TOKENS) * (
        cols * linear.weight.dtype.itemsize + rows * (linear.weight.dtype.itemsize + 8)
    )
    return 2 * 8 * cols * len(needs - {MOMENT} - _GRAMS) + moment + gram + probes


@dataclass(frozen=True)
class _Run:
    """The phases of a run, without its process and model."""

    blocks: list[Block]
    config: PruneConfig
    shape: "_Shape"
    tokens: int
    seqlen: int
    resident_hidden: bool

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return min(self.tokens, self.config.batch_samples(self.seqlen) * self.seqlen)

    @property
    def in_one_forward(self) -> bool:
        """Each Linear is pruned when the one batch reaches it."""
        return self.config.order == "sequential" and self.config.group != "model" and self.batch == self.tokens

    @property
    def states(self) -> int:
        """Bytes of all hidden states at one place of the model."""
        return self.tokens * self.shape.hidden * self.shape.itemsize

    @property
    def kept(self) -> int:
        """Bytes of hidden states in memory between two blocks."""
        return self.states if self.resident_hidden else 0

    @property
    def hidden(self) -> int:
        """While a block is pruned: training will read its inputs and the dense outputs in all its passes."""
        return self.kept + 2 * self.states if self.config.tune_epochs else self.kept

    def entering(self) -> Estimate:
        """The first batch runs through a block before the later ones' states are there."""
        forward = self.shape.forward_bytes(self.batch, self.seqlen, self.config.needs)
        return Estimate(hidden=max(0, self.kept - forward), forward=forward, phase="enter")

    def pruning(self) -> list[Estimate]:
        """Looking at a block's inputs, and pruning a matrix: in the forward, where that serves both."""
        needs = self.config.needs
        linears = [linear for block in self.blocks for linear in block.linears.values()]
        counted = [self._statistics(block, some, needs) for block, some in self._together()]
        statistics = sum(counted) if self.config.group == "model" else max(counted)
        solver = max(solver_bytes(self.config, *linear.weight.shape) for linear in linears)
        forward = self.shape.forward_bytes(self.batch, self.seqlen, needs)
        pending = 0
        if self.in_one_forward:
            stays = self.batch * self.shape.widest * self.shape.itemsize < _HEAP_TENSOR
            pending = forward if stays else self.shape.pending_bytes(self.batch)
        return [
            Estimate(hidden=self.hidden, forward=forward, statistics=statistics),
            Estimate(hidden=self.hidden, forward=pending, statistics=statistics, solver=solver),
        ]

    def _together(self) -> Iterator[tuple[Block, list[str]]]:
        """Linears whose statistics are in memory at a time, by name: of a block; of what reads one input, which is no
        more than what has as many columns, or than the experts of one fused tensor; of one Linear where it is pruned on
        the way."""
        for block in self.blocks:
            if self.config.order == "block" or self.config.group == "model":
                yield block, list(block.linears)
            elif self.in_one_forward:
                yield from ((block, [child]) for child in block.linears)
            else:
                yield from ((block, stage) for stage in block.expert_stages())
                others = {c: linear.weight.shape[1] for c, linear in block.linears.items() if not block.is_expert(c)}
                yield from ((block, [c for c in others if others[c] == columns]) for columns in set(others.values()))

    def _statistics(self, block: Block, children: Sequence[str], needs: frozenset[str]) -> int:
        """Bytes of these Linears' statistics. Each token is sent to few experts: theirs together see no more."""
        total = 0
        for child in children:
            tokens = self.tokens
            if block.is_expert(child) and len(children) > 1:
                tokens = math.ceil(tokens * self.shape.experts_of_a_token / self.shape.experts)
            total += _statistics_bytes(block.linears[child], needs, tokens)
        return total

    def training(self) -> list[Estimate]:
        """:func:`ace_ext.pruning.block_tuning.tune_block_` beside the block, its inputs and its targets.

        A trained weight: in float32 itself and Adam's two moments, in the model's dtype as it was before, and its mask.
        Then its gradient and a step's activations, or the gradient in float32, whichever is more, and what Adam or the
        backward pass computes of the largest matrix. Activations of a token, measured on Llama blocks as the process's
        growth: 55 bytes a hidden width, 20 a width of the MLP, and 16 an attention score where attention is not fused.
        """
        if not self.config.tune_epochs:
            return []
        shape = self.shape
        step = min(self.batch, step_samples(self.seqlen) * self.seqlen)
        activations = step * (55 * shape.hidden + 20 * shape.widest + 16 * shape.heads * self.seqlen + shape.routing)
        sizes = [[linear.weight.numel() for linear in block.linears.values()] for block in self.blocks]
        trained, largest = max(map(sum, sizes)), max(map(max, filter(None, sizes)))
        state = trained * (13 + shape.itemsize) + 12 * largest
        training = state + max(trained * shape.itemsize + activations, 4 * trained)
        return [Estimate(hidden=self.hidden, training=training, phase="tune")]

    def allocating(self) -> list[Estimate]:
        """The walk that measures what each block can give up, with hidden states of its own.

        A block's scores are held in float32; of the largest matrix, its errors in float64, sorted, with their order.
        """
        if self.config.allocation == "uniform":
            return []
        needs, linears = measure_needs(self.config), [list(block.linears.values()) for block in self.blocks]
        statistics = max(self._statistics(block, list(block.linears), needs) for block in self.blocks)
        scores = max(sum(4 * linear.weight.numel() for linear in some) for some in linears)
        largest = max(linear.weight.numel() for some in linears for linear in some)
        scores += (40 if self.config.allocation == "error" else 8) * largest
        forward = self.shape.forward_bytes(self.batch, self.seqlen, needs)
        hidden = 2 * self.kept
        return [
            Estimate(hidden=hidden, forward=forward, statistics=statistics, phase="allocate"),
            Estimate(hidden=hidden, statistics=statistics, solver=scores, phase="allocate"),
        ]


@dataclass(frozen=True)
class _Shape:
    """The sizes that an estimate is computed from."""

    blocks: Sequence[int]  # bytes of each block's parameters
    embedding: int  # bytes of parameters outside the blocks, an untied head's not counted
    head: int  # bytes of an untied head
    hidden: int  # width of the hidden states
    widest: int  # largest side of a Linear in a block
    heads: int  # attention heads whose scores are stored; 0 where attention is fused
    itemsize: int
    experts: int  # of a mixture with fused experts; else 0
    experts_of_a_token: int

    @classmethod
    def of(cls, model: nn.Module, blocks: list[Block]) -> "_Shape":
        sizes = [sum(p.nbytes for p in block.module.parameters()) for block in blocks]
        head, entrance = model.get_output_embeddings(), model.get_input_embeddings()
        untied = head is not None and head.weight is not entrance.weight
        head_bytes = sum(p.nbytes for p in head.parameters()) if untied else 0
        linears = [linear for block in blocks for linear in block.linears.values()]
        text = model.config.get_text_config()
        experts = max((len(fused.linears) for block in blocks for fused in block.experts), default=0)
        return cls(
            blocks=sizes,
            embedding=sum(p.nbytes for p in model.parameters()) - sum(sizes) - head_bytes,
            head=head_bytes,
            hidden=text.hidden_size,
            widest=max(max(linear.weight.shape) for linear in linears),
            heads=text.num_attention_heads if attends_eagerly(model) else 0,
            itemsize=linears[0].weight.dtype.itemsize,
            experts=experts,
            experts_of_a_token=min(experts, getattr(text, "num_experts_per_tok", None) or experts),
        )

    @property
    def routing(self) -> int:
        """Bytes a token while experts run: an integer for each place and expert says who goes where, and the router's
        probabilities."""
        return 8 * self.experts_of_a_token * (self.experts + 1) + (4 + self.itemsize) * self.experts

    def forward_bytes(self, tokens: int, seqlen: int, needs: frozenset[str]) -> int:
        """The most that is alive at a time for one batch in a block.

        - attention: residual and norm, then queries, keys and values before and after rotation (6 hidden widths);
        - a norm: residual, and three float32 copies;
        - MLP: residual and norm, then gate, up and their product, each as wide as the widest Linear;
        - statistics of its last Linear.
        """
        attention = tokens * (8 * self.hidden * self.itemsize + self.heads * seqlen * (4 + 2 * self.itemsize))
        norm = tokens * (2 * self.itemsize + 12) * self.hidden
        mlp = tokens * (2 * self.hidden + 3 * self.widest) * self.itemsize
        observed = self.pending_bytes(tokens)
        if MOMENT in needs:  # squares at most 2048 tokens at a time, in float32
            observed += 8 * min(tokens, 2048) * self.widest
        if needs & _GRAMS:  # widens a chunk to float32, and weighs a copy of it
            observed += (8 if COSINE_GRAM in needs else 4) * min(tokens, GramState.CHUNK_TOKENS) * self.widest
        return max(attention, norm, mlp + tokens * self.routing, observed)

    def pending_bytes(self, tokens: int) -> int:
        """What a forward holds while the last, widest Linear is looked at: the residual, the norm's and its input."""
        return tokens * ((2 * self.hidden + self.widest) * self.itemsize + self.routing)
