"""The sizes of a model from which its memory is estimated: what a forward pass and statistics hold at these sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ace_ext.data.requests import vocabulary_of
from ace_ext.models._transformers import attends_eagerly, output_head, predicts_tokens, text_config, token_embedding
from ace_ext.models.blocks import Block
from ace_ext.models.products import converted_bytes, slow_dtypes
from ace_ext.pruning.gram import CHUNK_TOKENS
from ace_ext.pruning.kinds import GRAM, GRAMS, MOMENT, SKETCH
from ace_ext.pruning.sketch import direction_count
from ace_ext.pruning.statistics import StatisticsCollector


@dataclass(frozen=True)
class ModelShape:
    """The sizes from which an estimate is computed."""

    blocks: Sequence[int]  # bytes of each block's parameters
    embedding: int  # bytes of parameters outside the blocks, without an untied head
    head: int  # bytes of an untied head
    vocabulary: int
    hidden: int  # width of the hidden states
    widest: int  # largest side of a Linear in a block
    heads: int  # attention heads whose scores are stored; 0 where attention is fused
    itemsize: int  # bytes of one weight
    converts: bool  # whether a CPU multiplies in float32 instead
    experts: int  # of a block with fused experts; else 0
    experts_of_a_token: int

    @classmethod
    def of(cls, model: nn.Module, blocks: list[Block]) -> "ModelShape":
        """The sizes of a model, or of a skeleton without weights."""
        sizes = [sum(p.nbytes for p in block.module.parameters()) for block in blocks]
        head, entrance = output_head(model), token_embedding(model)
        head_bytes = 0
        if head is not None and head.weight is not getattr(entrance, "weight", None):
            head_bytes = sum(p.nbytes for p in head.parameters())
        linears = [linear for block in blocks for linear in block.linears.values()]
        firsts = [next(iter(block.linears.values())) for block in blocks if block.linears]
        text, inputs = text_config(model), max(linear.in_features for linear in firsts)
        experts = max((len(fused.linears) for block in blocks for fused in block.experts), default=0)
        return cls(
            blocks=sizes,
            embedding=sum(p.nbytes for p in model.parameters()) - sum(sizes) - head_bytes,
            head=head_bytes,
            vocabulary=vocabulary_of(model) or 0,
            hidden=getattr(text, "hidden_size", inputs) if predicts_tokens(model) else inputs,
            widest=max(max(linear.weight.shape) for linear in linears),
            heads=_largest(getattr(text, "num_attention_heads", 0)) if attends_eagerly(model) else 0,
            itemsize=linears[0].weight.dtype.itemsize,
            converts=linears[0].weight.dtype in slow_dtypes(),
            experts=experts,
            experts_of_a_token=min(experts, getattr(text, "num_experts_per_tok", None) or experts),
        )

    @property
    def routing(self) -> int:
        """Bytes per token while experts run: int64 one-hot indices of the chosen experts, and the router's
        probabilities."""
        return 8 * self.experts_of_a_token * (self.experts + 1) + (4 + self.itemsize) * self.experts

    def forward_bytes(self, tokens: int, seqlen: int, needs: frozenset[str]) -> int:
        """The most bytes that one batch of ``tokens`` holds at a time in a block: :meth:`activation_bytes`, or what is
        held while a product is converted to float32, if any is."""
        converted = self._around_products(tokens, seqlen) + self.converted_bytes(tokens)
        return max(self.activation_bytes(tokens, seqlen, needs), converted)

    def activation_bytes(self, tokens: int, seqlen: int, needs: frozenset[str]) -> int:
        """The same without what is converted: the largest of

        - attention: residual and norm, then queries, keys and values before and after rotation (6 hidden widths);
        - a norm: residual, and three float32 copies;
        - MLP: residual and norm, then gate, up and their product, each as wide as the widest Linear;
        - statistics of its last Linear.
        """
        norm = tokens * (2 * self.itemsize + 12) * self.hidden
        observed = self.pending_bytes(tokens)
        if MOMENT in needs:  # squares at most 2048 tokens at a time, in float32
            observed += 8 * min(tokens, 2048) * self.widest
        if needs & (GRAMS | {SKETCH}):  # widens a chunk to float32, and weighs or squares a copy of it
            observed += (4 if GRAM in needs else 8) * min(tokens, CHUNK_TOKENS) * self.widest
        return max(self._around_products(tokens, seqlen), norm, observed)

    def _around_products(self, tokens: int, seqlen: int) -> int:
        """The larger of attention and MLP."""
        attention = tokens * (8 * self.hidden * self.itemsize + self.heads * seqlen * (4 + 2 * self.itemsize))
        mlp = tokens * (2 * self.hidden + 3 * self.widest) * self.itemsize
        return max(attention, mlp + tokens * self.routing)

    def converted_bytes(self, tokens: int) -> int:
        """What a product in a block holds in float32 on a CPU that is slow at the model's dtype."""
        sides = ((self.widest, self.hidden), (self.hidden, self.widest), (self.hidden, self.hidden))
        return max(converted_bytes(tokens, *shape) for shape in sides) if self.converts else 0

    def converted_head_bytes(self, tokens: int) -> int:
        """The same of the product with the LM head."""
        return converted_bytes(tokens, self.vocabulary, self.hidden) if self.converts else 0

    def pending_bytes(self, tokens: int) -> int:
        """Bytes that a forward holds while the last, widest Linear is called: the residual, the norm's output and the
        Linear's input."""
        return tokens * ((2 * self.hidden + self.widest) * self.itemsize + self.routing)

    def waiting_bytes(self, tokens: int) -> int:
        """Bytes that forwards hold which wait before a Linear: before the widest one, or before attention's last one,
        when its input, the normed residual, queries, keys and values (at most 6 hidden widths) are there."""
        return max(self.pending_bytes(tokens), tokens * 6 * self.hidden * self.itemsize)

    def training_bytes(self, tokens: int, seqlen: int) -> int:
        """The activations that a block stores for its backward pass. For each token, measured on Llama blocks as growth
        of the process: 55 bytes per hidden column, 20 per column of the MLP, and 16 per attention score if attention is
        not fused. With experts the routing counts twice: forward, and stored."""
        scores = 16 * self.heads * seqlen
        stored = tokens * (55 * self.hidden + 20 * self.widest + scores + 2 * self.routing)
        return stored + self.converted_bytes(tokens)


def _largest(value: int | Sequence[int]) -> int:
    """Models of several stages have a number for each."""
    return value if isinstance(value, int) else max(value)


def statistics_bytes(linear: nn.Linear, needs: frozenset[str], tokens: int) -> int:
    """Bytes of one Linear's statistics: two float64 vectors per state, the cross moment and the Gram matrix in float32,
    and the sample rows: the input, the dense output, and the outputs before and after pruning in float32."""
    rows, cols = linear.weight.shape
    moment = 4 * rows * cols if MOMENT in needs else 0
    gram = 4 * cols * cols if needs & GRAMS else 0
    sketch = 4 * cols * direction_count(cols) + 8 * cols if SKETCH in needs else 0
    samples = min(tokens, StatisticsCollector.SAMPLE_ROWS) * (
        cols * linear.weight.dtype.itemsize + rows * (linear.weight.dtype.itemsize + 8)
    )
    return 2 * 8 * cols * len(needs - {MOMENT, SKETCH} - GRAMS) + moment + gram + sketch + samples
