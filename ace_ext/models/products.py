"""Products of half-precision matrices on CPUs that have no instructions for them.

On such CPUs torch multiplies bfloat16 and float16 numbers one by one, three to four times slower than float32 with 32
tokens and five to nine times with 128 and more (``benchmarks/float32_products.py`` on an AMD EPYC with AVX2). So parts
of both matrices are converted, and multiplied in float32. Like torch's own products, these are sums in float32 that are
rounded once; only the order of their terms differs. The backward pass of attention is in float32 too
(:mod:`ace_ext.models.attention`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ace_ext.models.attention import arguments_of, attention, differentiates

MIN_TOKENS = 4
"""With fewer tokens torch's loops are as fast as converting the weight."""
TOKENS, PART = 1024, 2**22
"""The largest number of tokens, and of their elements, that are converted at a time; but at least 64 tokens of any
width."""
ROWS, PANEL = 2048, 2**20
"""The largest number of a weight's rows, and of their elements, that are converted at a time; but at least 64 rows of
any width."""


class OtherwiseComputed(TorchFunctionMode):
    """Within this context a call returns the result of :meth:`instead`, if there is one. The mode is off inside that
    method."""

    def instead(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of a call; None: torch computes it."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = self.instead(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if found is None else found


@cache
def slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes for whose products this machine's CPU has no instructions that torch uses."""
    found = set()
    for dtype, name in ((torch.bfloat16, "_is_mkldnn_bf16_supported"), (torch.float16, "_is_mkldnn_fp16_supported")):
        supported = getattr(torch.ops.mkldnn, name, None)  # None: a torch without oneDNN
        if supported is None or not supported():
            found.add(dtype)
    return frozenset(found)


@contextmanager
def float32_products(of: nn.Module | Tensor) -> Iterator[None]:
    """Within this context Linears multiply in float32 on a CPU, also in the backward pass, and so does the backward
    pass of attention, if the dtype of a module or a tensor is one of :func:`slow_dtypes`."""
    dtype = of.dtype if isinstance(of, Tensor) else next(of.parameters()).dtype
    if dtype in slow_dtypes():
        with _Widened():
            yield
    else:
        yield


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices of one dtype, in float32 on a CPU if the dtype is one of :func:`slow_dtypes`."""
    return float32_matmul(a, b) if _is_slow_tensor(b) else a @ b


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of half-precision matrices on a CPU, in float32, rounded once. Parts of them are converted at a time."""
    return _product(a, b, _panel(b.shape[1])).to(b.dtype)


def converted_bytes(tokens: int, rows: int, cols: int) -> int:
    """The most bytes in float32 that a product of ``[tokens, cols]`` with ``[rows, cols]`` needs at a time: about 30 MB
    for matrices of any size."""
    part, panel = min(tokens, _part(cols)), min(rows, _panel(cols))
    return 4 * (part * cols + panel * cols + part * panel)


class _Widened(OtherwiseComputed):
    def instead(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        if func is functional.scaled_dot_product_attention:
            given = arguments_of(args, kwargs)
            return attention(given) if differentiates(given) and _is_slow_tensor(given["query"]) else None
        if func is not functional.linear or kwargs or not _is_slow(*args):
            return None
        found: Tensor = _Linear.apply(*args, *[None] * (3 - len(args)))  # type: ignore[no-untyped-call]
        return found


def _is_slow(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        _is_slow_tensor(x)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and (bias is None or bias.dtype == x.dtype)
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1] > 0
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
    )


def _is_slow_tensor(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in slow_dtypes()


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b`` and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], len(weight))
        rows, filled = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
        for part in _slices(len(rows), _part(rows.shape[1])):
            _fill(filled[part], rows[part], weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, below = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        wanted, of_x, of_weight = ctx.needs_input_grad, None, None
        if wanted[0]:
            of_x = torch.empty_like(rows)
            for part in _slices(len(rows), _part(rows.shape[1])):
                of_x[part] = float32_matmul(below[part], weight)
            of_x = of_x.view(x.shape)
        if wanted[1]:
            of_weight = torch.empty_like(weight)
            for panel in _slices(len(weight), _panel(rows.shape[1])):
                of_weight[panel] = _product(below[:, panel].T, rows, _part(rows.shape[1]))
        return of_x, of_weight, below.sum(0, dtype=torch.float32).to(x.dtype) if wanted[2] else None


def _fill(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Writes a part of the outputs, a panel of the weight's rows at a time."""
    given = x.float()
    for panel in _slices(len(weight), _panel(weight.shape[1])):
        _fill_panel(out[:, panel], given, weight[panel], None if bias is None else bias[panel])


def _fill_panel(out: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    # A separate function, so that a converted panel is freed before the next one is converted.
    found = given @ weight.float().T
    out.copy_(found if bias is None else found.add_(bias))


def _product(a: Tensor, b: Tensor, step: int) -> Tensor:
    """``a [n, k]`` times ``b [k, m]`` in float32. ``step`` entries along k are converted at a time."""
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float32)
    for part in _slices(len(b), step):
        total.addmm_(a[:, part].float(), b[part].float())
    return total


def _part(cols: int) -> int:
    """How many tokens are converted at a time."""
    return max(64, min(TOKENS, PART // cols))


def _panel(cols: int) -> int:
    """How many rows of a weight are converted at a time."""
    return max(64, min(ROWS, PANEL // cols))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))
