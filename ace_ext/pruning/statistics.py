"""Streaming statistics of a block's Linear inputs, taken by forward hooks.

Linears that are handed the very same tensor (q, k and v; gate and up) share one state of its moments. The weighted ones
depend on each Linear's own output. The plain Gram matrix is shared like the moments.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext import ops
from ace_ext.models.experts import ExpertLinear, filled_linear
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, MOMENT, WEIGHTED


class MomentState:
    """Weighted Welford state of ``[d]`` columns: ``weight_sum []``, ``mean [d]``, ``m2 [d]``, float64.

    ``m2`` is the weighted sum of squared deviations from the weighted mean. See ``csrc/core/moments.h``.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(columns, dtype=torch.float64, device=device)

    def update(self, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Merges tokens ``x [T, d]``, each of weight ``token_weight [T]`` float32, or 1."""
        ops.update_moments_(self.weight_sum, self.mean, self.m2, x, token_weight)

    def merge_(self, other: "MomentState") -> None:
        """Takes the other state's tokens in, by Chan's rule (1983); a side of weight 0 changes nothing."""
        total = self.weight_sum + other.weight_sum
        share = other.weight_sum / total.clamp_min(torch.finfo(torch.float64).tiny)
        shift = other.mean - self.mean
        self.mean += shift * share
        self.m2 += other.m2 + shift.square() * self.weight_sum * share
        self.weight_sum.copy_(total)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name: what a file or another process gets."""
        return {"weight_sum": self.weight_sum, "mean": self.mean, "m2": self.m2}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "MomentState":
        state = cls(len(tensors["mean"]), tensors["mean"].device)
        state.weight_sum, state.mean, state.m2 = tensors["weight_sum"], tensors["mean"], tensors["m2"]
        return state

    @property
    def square_sum(self) -> Tensor:
        """``Σ_t w_t X_tj²``: ``[d]`` float64."""
        return self.m2 + self.weight_sum * self.mean.square()

    @property
    def variance(self) -> Tensor:
        """``Σ_t w_t (X_tj - mean_j)² / Σ_t w_t``: ``[d]`` float64; 0 for an empty state."""
        return self.m2 / self.weight_sum.clamp_min(torch.finfo(torch.float64).tiny)


@dataclass
class LinearStatistics:
    """What the metrics read about one Linear. Vectors are ``[d_in]`` float64.

    ``weighted`` counts each token with ``r_t = 1 / ‖A_t‖²``, ``A`` the dense output without bias. ``moment`` is
    ``Σ_t r_t² A_ti² X_tj²``, ``[d_out, d_in]`` float32. What the metric does not need is None.
    """

    input: MomentState | None
    weighted: MomentState | None
    moment: Tensor | None
    gram: GramState | None = None
    """``Σ_t X_t X_tᵀ``, or weighted by ``r_t`` for the kind ``COSINE_GRAM``."""
    tokens: int = 0
    probe: list[Tensor] = field(default_factory=list)
    """A few input rows of each batch, on which the report measures what pruning did to the output."""

    def parts(self) -> dict[str, MomentState | GramState | Tensor | list[Tensor]]:
        """What was collected, by kind, the probe included. Linears of one input hold the very same objects."""
        kinds = {"input": self.input, "weighted": self.weighted, "moment": self.moment, "gram": self.gram}
        kinds["probe"] = self.probe
        return {kind: value for kind, value in kinds.items() if value is not None}

    @property
    def probe_rows(self) -> Tensor:
        """``[tokens, d_in]``: the probe in one piece."""
        return self.probe[0] if len(self.probe) == 1 else torch.cat(self.probe)

    @property
    def norm(self) -> Tensor:
        """``‖X_j‖``"""
        return self.input.square_sum.sqrt()

    @property
    def deviation(self) -> Tensor:
        """``σ_j``, the standard deviation of ``X_j`` over tokens."""
        return self.input.variance.sqrt()

    @property
    def weighted_square_sum(self) -> Tensor:
        """``Σ_t r_t X_tj²``"""
        return self.weighted.square_sum

    @property
    def weighted_deviation(self) -> Tensor:
        """``σʳ_j = sqrt(Σ_t r_t (X_tj - m_j)²)``: a sum, not a mean, like ``‖X_j‖``."""
        return self.weighted.m2.sqrt()


@dataclass
class _Shared:
    """What Linears of one input have in common."""

    input: MomentState | None = None
    gram: GramState | None = None
    probe: list[Tensor] = field(default_factory=list)


class StatisticsCollector:
    """Collects :class:`LinearStatistics` of the named Linears while a block runs, in :attr:`stats`.

    Where one call a Linear is all, its statistics may be taken out of there after it.

    ``token_mask`` (flat, bool; set it before each forward, None for all) leaves padded tokens out. Call
    :meth:`observe` from a hook, or use the collector as a context manager that hooks all its Linears.
    """

    PROBE_TOKENS = 128

    def __init__(
        self, linears: dict[str, nn.Linear], needs: frozenset[str], batches: int = 1, token_norm: str = "exact"
    ) -> None:
        """``token_norm`` is that of :class:`ace_ext.PruneConfig`: where ``‖A_t‖`` comes from."""
        self.linears = linears
        self.needs = needs
        self._sketched = token_norm == "sketch"
        self.stats: dict[str, LinearStatistics] = {}
        self.token_mask: Tensor | None = None
        self._probe_rows = max(1, self.PROBE_TOKENS // batches)
        self._leader: dict[str, str] = {}  # whose input state a Linear shares
        self._shared = _Shared()  # by the Linears of the newest input
        self._last: tuple[str, Tensor] | None = None  # who saw which tensor last
        self._handles: list = []

    def __enter__(self) -> "StatisticsCollector":
        for name, linear in self.linears.items():
            hook = lambda module, args, output, name=name: self.observe(name, args[0], output)  # noqa: E731
            self._handles.append(linear.register_forward_hook(hook))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    @property
    def wants_output(self) -> bool:
        """Whether the statistics read a Linear's dense output, or its input and weight alone."""
        return MOMENT in self.needs or (self._weighs_tokens and not self._sketched)

    @property
    def _weighs_tokens(self) -> bool:
        return bool(self.needs & {WEIGHTED, COSINE_GRAM})

    def observe(self, name: str, x: Tensor, output: Tensor | None) -> None:
        """Adds one call of a Linear: its input ``[..., d_in]`` and output ``[..., d_out]`` with bias, or None where
        :attr:`wants_output` is false."""
        leader = self._share(name, x)
        rows = self._tokens(x)
        stats = self.stats.get(name)
        if stats is None:
            stats = self.stats[name] = self._new_stats(name, leader, rows.device)
        stats.tokens += len(rows)
        if len(rows) == 0:
            return
        if leader == name:
            step = max(1, len(rows) // self._probe_rows)
            stats.probe.append(rows[::step][: self._probe_rows].clone())
            if INPUT in self.needs:
                stats.input.update(rows)
            if GRAM in self.needs:
                stats.gram.update(rows)
        if self.wants_output:
            bias = self.linears[name].bias
            dense = self._tokens(output if bias is None else output - bias)
            if MOMENT in self.needs:
                ops.update_cosine_moment_(stats.moment, rows, dense)
        elif self._weighs_tokens:
            linear = self.linears[name]
            product = filled_linear if isinstance(linear, ExpertLinear) else functional.linear
            dense = sketched_output(rows, linear.weight, product)
        if self._weighs_tokens:
            self._update_weighted(stats, rows, ops.inverse_square_norm(dense))

    def _update_weighted(self, stats: LinearStatistics, rows: Tensor, token_weight: Tensor) -> None:
        """What counts tokens with ``token_weight [T]``, on the inputs ``rows [T, d_in]``."""
        if WEIGHTED in self.needs:
            stats.weighted.update(rows, token_weight)
        if COSINE_GRAM in self.needs:
            stats.gram.update(rows, token_weight)

    def empty(self, name: str) -> LinearStatistics:
        """Statistics of no token, of a Linear that was not called."""
        weight = self.linears[name].weight
        stats = self._new_stats(name, name, weight.device)
        stats.probe.append(weight.new_zeros(0, weight.shape[1]))
        return stats

    def _share(self, name: str, x: Tensor) -> str:
        """The Linear whose input statistics serve this one: fixed at its first call."""
        if name not in self._leader:
            shared = self._last is not None and self._last[1] is x
            self._leader[name] = self._leader[self._last[0]] if shared else name
        self._last = (name, x)
        return self._leader[name]

    def _new_stats(self, name: str, leader: str, device: torch.device) -> LinearStatistics:
        rows, columns = self.linears[name].weight.shape
        if leader == name:
            self._shared = _Shared()  # what came before goes, unless a Linear's statistics still hold it
            self._shared.input = MomentState(columns, device) if INPUT in self.needs else None
            self._shared.gram = GramState(columns, device) if GRAM in self.needs else None
        shared = self.stats.get(leader, self._shared)
        return LinearStatistics(
            shared.input,
            MomentState(columns, device) if WEIGHTED in self.needs else None,
            torch.zeros(rows, columns, device=device) if MOMENT in self.needs else None,
            GramState(columns, device) if COSINE_GRAM in self.needs else shared.gram,
            probe=shared.probe,
        )

    def _tokens(self, x: Tensor) -> Tensor:
        """``[T, d]`` without padded tokens. A mask that does not fit (an expert's own choice of tokens) is not used."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.token_mask is not None and len(self.token_mask) == len(rows):
            rows = rows[self.token_mask]
        return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


SKETCH_ROWS = 128
"""Of a random projection of the outputs: each token's squared norm is then known to sqrt(2 / 128), an eighth."""


def sketched_output(x: Tensor, weight: Tensor, product: Callable = functional.linear) -> Tensor:
    """``[T, min(d_out, SKETCH_ROWS)]``: rows whose norms stand for those of ``x Wᵀ``, at a fraction of its cost.

    ``x (S W)ᵀ`` with S random signs over ``sqrt(SKETCH_ROWS)``: the expected square of its norm is ``‖A_t‖²``
    (Achlioptas 2003, database-friendly random projections). S depends on the shape alone, so a run can be repeated.
    """
    if len(weight) <= SKETCH_ROWS:
        return product(x, weight)
    return product(x, _projection(len(weight), weight.device, weight.dtype) @ weight)


@lru_cache(maxsize=8)  # a model's Linears have few shapes
def _projection(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(rows)
    signs = torch.randint(0, 2, (SKETCH_ROWS, rows), generator=random) * 2 - 1
    return (signs / SKETCH_ROWS**0.5).to(device, dtype)
