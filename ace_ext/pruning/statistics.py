"""Streaming statistics of the inputs of a block's Linears, collected by forward hooks.

Linears that read the same tensor (q, k and v; gate and up) share one state for its moments and its plain Gram matrix.
Weighted statistics depend on each Linear's own output and are not shared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ace_ext import ops
from ace_ext.errors import InputError
from ace_ext.models.fused_weights import ExpertLinear, filled_linear
from ace_ext.models.products import float32_products, matmul
from ace_ext.models.replay import BlockCall
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.kinds import GRAM, INPUT, MOMENT, OWN_GRAMS, ROUNDING_GRAM, SHARED_GRAM, SKETCH, WEIGHTED
from ace_ext.pruning.scaling import InputScale, exponent_on_device, reads_at_once
from ace_ext.pruning.sketch import SketchState


class MomentState:
    """Weighted Welford state of ``d`` columns: ``weight_sum []``, ``mean [d]``, ``m2 [d]``, float64.

    ``m2`` is the weighted sum of squared deviations from the weighted mean. See ``csrc/core/moments.h``.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(columns, dtype=torch.float64, device=device)
        self._scale = InputScale()

    def update(self, x: Tensor, token_weight: Tensor | None = None) -> None:
        """Adds tokens ``x [T, d]`` with the weights ``token_weight [T]`` float32; None: 1 for each."""
        if token_weight is not None:  # 1 / ‖A_t‖² cancels the scale of the inputs
            ops.update_moments_(self.weight_sum, self.mean, self.m2, x, token_weight)
            return
        unit = self._unit(x)
        if unit is None:
            ops.update_moments_(self.weight_sum, self.mean, self.m2, x, None)
            return
        # The op squares in float32. The float64 state has enough range to be divided during the call.
        inverse = unit.reciprocal()
        self.mean *= inverse
        self.m2 *= inverse.square()
        ops.update_moments_(self.weight_sum, self.mean, self.m2, x * inverse.to(x.dtype), None)
        self.mean *= unit
        self.m2 *= unit.square()

    def _unit(self, x: Tensor) -> Tensor | None:
        """The power of two that divides ``x [T, d]`` while it is added: ``[]`` float64, on its device. None for 1, if
        that is known without waiting for a GPU."""
        if x.dtype == torch.float16:  # float32 holds the square of each such number
            return None
        if reads_at_once(x):
            self._scale.admit(x)
            if self._scale.power == 0:
                return None
        exponent = exponent_on_device(x)
        return torch.ldexp(torch.ones((), dtype=torch.float64, device=x.device), exponent)

    def merge_(self, other: "MomentState") -> None:
        """Adds the other state's tokens by Chan's rule (1983). A state of weight 0 changes nothing."""
        total = self.weight_sum + other.weight_sum
        share = other.weight_sum / total.clamp_min(torch.finfo(torch.float64).tiny)
        shift = other.mean - self.mean
        self.mean += shift * share
        self.m2 += other.m2 + shift.square() * self.weight_sum * share
        self.weight_sum.copy_(total)

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, for a file or for another process."""
        return {"weight_sum": self.weight_sum, "mean": self.mean, "m2": self.m2}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "MomentState":
        """The state of :meth:`tensors`. It uses the given tensors themselves, not copies."""
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


Kept = TypeVar("Kept")


def _collected(value: Kept | None) -> Kept:
    """The value. Raises ValueError if its kind was not collected."""
    if value is None:
        raise ValueError("this kind of statistics was not collected; add it to the needs of the metric")
    return value


@dataclass
class LinearStatistics:
    """The statistics of one Linear's inputs. Vectors are ``[d_in]`` float64.

    ``weighted`` weights each token by ``r_t = 1 / ‖A_t‖²``, where ``A`` is the dense output without bias. ``moment`` is
    ``Σ_t r_t² A_ti² X_tj²``, ``[d_out, d_in]`` float32. Kinds that were not collected are None.
    """

    input: MomentState | None
    weighted: MomentState | None
    moment: Tensor | None
    gram: GramState | SketchState | None = None
    """``Σ_t s_t² X_t X_tᵀ``: ``s_t`` is 1 for the kind ``GRAM``, else that of :func:`token_scales`. Or its sketch."""
    tokens: int = 0
    sampled: list[Tensor] = field(default_factory=list)
    """Sample rows: a few inputs of each batch. The report measures the change of the output on them."""

    def parts(self) -> dict[str, MomentState | GramState | SketchState | Tensor | list[Tensor]]:
        """The collected statistics by kind, with the sample rows. Linears with the same input share objects."""
        kinds: dict[str, MomentState | GramState | SketchState | Tensor | list[Tensor] | None] = {
            "input": self.input,
            "weighted": self.weighted,
            "moment": self.moment,
            "gram": self.gram,
        }
        kinds["probe"] = self.sampled  # the name of sample rows in statistics files
        return {kind: value for kind, value in kinds.items() if value is not None}

    @property
    def sample_rows(self) -> Tensor:
        """``[tokens, d_in]``: the sample rows in one tensor."""
        return self.sampled[0] if len(self.sampled) == 1 else torch.cat(self.sampled)

    @property
    def norm(self) -> Tensor:
        """``‖X_j‖``"""
        return _collected(self.input).square_sum.sqrt()

    @property
    def deviation(self) -> Tensor:
        """``σ_j``, the standard deviation of ``X_j`` over tokens."""
        return _collected(self.input).variance.sqrt()

    @property
    def weighted_square_sum(self) -> Tensor:
        """``Σ_t r_t X_tj²``"""
        return _collected(self.weighted).square_sum

    @property
    def weighted_deviation(self) -> Tensor:
        """``σʳ_j = sqrt(Σ_t r_t (X_tj - m_j)²)``: a sum, not a mean, like ``‖X_j‖``."""
        return _collected(self.weighted).m2.sqrt()


@dataclass
class _Shared:
    """The statistics that Linears with the same input share."""

    input: MomentState | None = None
    gram: GramState | SketchState | None = None
    sampled: list[Tensor] = field(default_factory=list)


class StatisticsCollector:
    """Collects :class:`LinearStatistics` of the named Linears while a block runs, in :attr:`stats`.

    If a Linear is called only once, its entry may be removed right after the call to free memory. A Linear that is
    called more often must be in :attr:`alone`; its statistics are those of all calls.

    ``token_mask`` excludes padded tokens: ``[T]`` bool, or None for all; ``starts [T]`` bool marks the first token of
    each sample, or None; ``states`` are tensors of other states that Linears may read, such as an encoder's output,
    each with its own mask. Set them before each forward, as :meth:`enter` does. Call :meth:`observe` from a hook, or
    use the collector as a context manager that hooks all its Linears.
    """

    SAMPLE_ROWS = 128
    """Sample rows of a Linear, in all batches together."""

    def __init__(
        self, linears: dict[str, nn.Linear], needs: frozenset[str], batches: int = 1, token_norm: str = "exact"
    ) -> None:
        """``needs``: kinds of statistics; ``batches``: their number; ``token_norm``: as in the stage ``collect``."""
        self.linears = linears
        self.needs = needs
        self._sketched = token_norm == "sketch"
        self.stats: dict[str, LinearStatistics] = {}
        self.token_mask: Tensor | None = None
        self.starts: Tensor | None = None
        self.states: Sequence[tuple[Tensor, Tensor | None]] = ()
        self._samples: int | None = None
        self._sample_rows = max(1, self.SAMPLE_ROWS // batches)
        self._leader: dict[str, str] = {}  # the Linear whose input statistics a Linear shares
        self._shared = _Shared()  # the statistics of the newest input
        self._last: tuple[str, Tensor] | None = None  # the last Linear called, and its input
        self._handles: list[RemovableHandle] = []
        self.alone: frozenset[str] = frozenset()
        """Linears that share no statistics, because they are called more than once."""

    def __enter__(self) -> "StatisticsCollector":
        for name, linear in self.linears.items():
            hook = lambda module, args, output, name=name: self.observe(name, args[0], output)  # noqa: E731
            self._handles.append(linear.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def enter(self, call: BlockCall) -> None:
        """To be called before a block runs on a batch: its padding, first tokens and other states."""
        self.token_mask, self.starts, self.states = call.token_mask, call.starts, call.states
        self._samples = call.samples

    @property
    def wants_output(self) -> bool:
        """Whether the statistics read a Linear's dense output. If not, its input and weight suffice."""
        return MOMENT in self.needs or (WEIGHTED in self.needs and not self._sketched)

    def observe(self, name: str, x: Tensor, output: Tensor | None) -> None:
        """Adds one call of a Linear: its input ``[..., d_in]`` and output ``[..., d_out]`` with bias, or None if
        :attr:`wants_output` is false."""
        leader = self._share(name, x)
        mask = self._mask_of(x)
        mask = None if mask is None else mask.to(x.device)  # a block may be on another GPU than the first
        rows = _tokens(x, mask)
        stats = self.stats.get(name)
        if stats is None:
            stats = self.stats[name] = self._new_stats(name, leader, rows.device)
        stats.tokens += len(rows)
        if len(rows) == 0:
            return
        if leader == name:
            step = max(1, len(rows) // self._sample_rows)
            stats.sampled.append(rows[::step][: self._sample_rows].clone())
            if INPUT in self.needs:
                _collected(stats.input).update(rows)
        sketched = cache(partial(self._sketched_output, name, rows))
        if stats.gram is not None and (leader == name or self.needs & OWN_GRAMS):
            stats.gram.update(rows, None if GRAM in self.needs else self._scales(sketched(), x, mask))
        if self.wants_output:
            bias: Tensor | None = self.linears[name].bias
            dense = _tokens(_collected(output) if bias is None else _collected(output) - bias, mask)
            if MOMENT in self.needs:
                ops.update_cosine_moment_(_collected(stats.moment), rows, dense)
        elif WEIGHTED in self.needs:
            dense = sketched()
        if WEIGHTED in self.needs:
            _collected(stats.weighted).update(rows, token_weights(name, dense))
        elif MOMENT in self.needs and dense.is_cpu:
            token_weights(name, dense)  # checks them: the op computes its own

    def _scales(self, dense: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The factors ``[T]`` of tokens in a Gram matrix. ``dense``: their outputs; ``x``, ``mask``: as the input of
        :meth:`observe` and the mask of its tokens."""
        scale = token_scales(dense)
        if ROUNDING_GRAM in self.needs and self.starts is not None and len(self.starts) == x.shape[:-1].numel():
            starts = self.starts.to(x.device)
            first = starts if mask is None else starts[mask]
            scale[first] = (FIRST_TOKEN * scale[first]).clamp_max(LARGEST_SCALE)
        return scale

    def _sketched_output(self, name: str, rows: Tensor) -> Tensor:
        linear = self.linears[name]
        product = filled_linear if isinstance(linear, ExpertLinear) else functional.linear
        return sketched_output(rows, linear.weight, product)

    def empty(self, name: str) -> LinearStatistics:
        """Statistics of zero tokens, for a Linear that was not called."""
        weight = self.linears[name].weight
        stats = self._new_stats(name, name, weight.device)
        stats.sampled.append(weight.new_zeros(0, weight.shape[1]))
        return stats

    def _share(self, name: str, x: Tensor) -> str:
        """The Linear whose input statistics this one shares. The first call decides it."""
        if name in self.alone:
            self._leader[name], self._last = name, None
            return name
        if name not in self._leader:
            last = self._last
            self._leader[name] = self._leader[last[0]] if last is not None and last[1] is x else name
        self._last = (name, x)
        return self._leader[name]

    def _new_stats(self, name: str, leader: str, device: torch.device) -> LinearStatistics:
        rows, columns = self.linears[name].weight.shape
        if leader == name:
            self._shared = _Shared()  # frees that of the last input, unless a Linear's statistics still use it
            self._shared.input = MomentState(columns, device) if INPUT in self.needs else None
            if self.needs & {GRAM, SHARED_GRAM, SKETCH}:
                self._shared.gram = (SketchState if SKETCH in self.needs else GramState)(columns, device)
        shared = self.stats.get(leader, self._shared)
        return LinearStatistics(
            shared.input,
            MomentState(columns, device) if WEIGHTED in self.needs else None,
            torch.zeros(rows, columns, dtype=torch.float32, device=device) if MOMENT in self.needs else None,
            GramState(columns, device) if self.needs & OWN_GRAMS else shared.gram,
            sampled=shared.sampled,
        )

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of padded tokens of a Linear's input."""
        for states, mask in self.states:
            if x.data_ptr() == states.data_ptr() and x.shape == states.shape:
                return mask
        mask, samples = self.token_mask, self._samples
        if mask is None or x.dim() != 3 or x.shape[:2].numel() != len(mask):
            return mask
        if x.shape[0] != samples and x.shape[1] == samples:  # Longformer's attention reads [seqlen, batch, d_in]
            return mask.view(samples, -1).T.flatten()
        return mask


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[T, d]`` without padded tokens. A mask of a different length is ignored: an expert has its own tokens."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None and len(mask) == len(rows):
        rows = rows[mask]
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


LARGEST_SCALE = 2.0**126
"""Of a token in a Gram matrix, so that it is finite."""

FIRST_TOKEN = 4.0
"""The factor of the first token of a sample in ``ROUNDING_GRAM``, so 16 in the squared error. Most heads of a causal
language model attend to it, so an error of its key and its value reaches all tokens, and it is one of many in a sum."""

LARGEST_NORM = 1e16
"""Of an output that weights its token. Products of its weight with squares of inputs and outputs would otherwise come
near the smallest float32, and lose digits."""


def token_weights(name: str, dense: Tensor) -> Tensor:
    """``r_t = 1 / ‖A_t‖²`` of the outputs ``A [T, d_out]`` of the Linear ``name``: ``[T]`` float32, 0 for an output of
    zero.

    Raises:
        InputError: a norm is below 1e-19 or above :data:`LARGEST_NORM`. This is not checked on a GPU, where it would
            wait for queued work.
    """
    weight = ops.inverse_square_norm(dense)
    lost = ~torch.isfinite(weight) | (weight < LARGEST_NORM**-2)
    if weight.is_cpu and bool(lost.any()):
        norms = torch.linalg.vector_norm(dense[lost].double(), dim=1)
        wrong = norms[torch.isfinite(norms) & (norms > 0)]
        if len(wrong):
            raise InputError(
                f"{name}: token weights 1 / ‖output‖² need a norm between 1e-19 and {LARGEST_NORM:g} (got "
                f"{float(wrong[0]):.3g}); use a score without token weights, such as wanda"
            )
    return weight


def token_scales(dense: Tensor) -> Tensor:
    """``s_t = 2^-round(log₂ ‖A_t‖)`` of the outputs ``A [T, d_out]`` of a Linear: ``[T]`` float32, 0 for an output of
    zero, NaN for one that is not finite. A product with a power of two rounds no bfloat16."""
    norm = torch.linalg.vector_norm(dense.double(), dim=1)
    scale = torch.exp2(-norm.log2().round().clamp(-126, 126)).float()  # to LARGEST_SCALE
    return scale.masked_fill(norm == 0, 0.0).masked_fill(~torch.isfinite(norm), torch.nan)


Product = Callable[[Tensor, Tensor], Tensor]
"""``x Wᵀ`` of ``x [T, d_in]`` and ``W [d_out, d_in]``."""

SKETCH_ROWS = 128
"""Rows of the random projection. A token's squared norm has a relative standard error of ``sqrt(2 / 128) = 1/8``."""


def sketched_output(x: Tensor, weight: Tensor, product: Product = functional.linear) -> Tensor:
    """``[T, min(d_out, SKETCH_ROWS)]``: rows whose norms estimate those of ``x Wᵀ``, at a fraction of its cost.

    ``x (S W)ᵀ``, where S holds random signs divided by ``sqrt(SKETCH_ROWS)``. The expected square of its norm is
    ``‖A_t‖²`` (Achlioptas 2003, database-friendly random projections). S depends on the shape alone, so runs are
    reproducible.
    """
    if len(weight) > SKETCH_ROWS:
        weight = matmul(_projection(len(weight), weight.device, weight.dtype), weight)
    with float32_products(weight):  # as in the forward, in whatever thread this runs
        return product(x, weight)


@lru_cache(maxsize=8)  # a model's Linears have few shapes
def _projection(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(rows)
    signs = torch.randint(0, 2, (SKETCH_ROWS, rows), generator=random) * 2 - 1
    projection: Tensor = (signs.float() / SKETCH_ROWS**0.5).to(device, dtype)
    return projection
