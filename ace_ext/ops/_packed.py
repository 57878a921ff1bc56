"""Products with a packed matrix, whose zeros are not stored.

Contracts: ``csrc/ops/packed.h`` and, for quantized survivors, ``csrc/ops/quantized.h``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ace_ext.ops._extension import build_info, registered


def with_whole_rows(x: Tensor) -> Tensor:
    """``x [tokens, cols]`` with rows as the ops take them: the numbers of one side by side, and rows apart. Copies a
    transposed or expanded ``x``. A compiler cannot ask for strides of symbolic sizes."""
    if torch.compiler.is_compiling():
        return x.contiguous()
    return x if x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) >= x.shape[1]) else x.contiguous()


def packed_linear(
    x: Tensor, bitmap: Tensor, values: Tensor, row_start: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``x Wᵀ + bias``, ``[tokens, rows]`` in the dtype of ``x [tokens, cols]``; products are summed in float32.

    ``bitmap [rows, 8 ceil(cols / 64)]`` uint8 has a bit for each weight (the lowest of the first byte is column 0), set
    if ``values`` has it: ``[rows, k]`` if each row has k, else ``[survivors]`` and ``row_start [rows + 1]`` int64.
    ``bias [rows]``. Whether bits and counts agree is not checked here: check the matrix with
    :meth:`ace_ext.packed.matrix.PackedMatrix.check`. Gradients flow to ``x`` and ``bias``. Under autocast dtypes stay
    as given. CPU, and CUDA if the extension was built for it (:func:`has_kernel`; not run on a GPU).
    """
    return _product("packed_linear", bias, x, bitmap, values, row_start)


@torch.no_grad()
def unpack_bitmap(bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    """The dense matrix ``[rows, cols]`` of :func:`packed_linear`'s tensors; finite weights keep their bits."""
    weight: Tensor = registered().unpack_bitmap(bitmap, values, row_start, cols)
    return weight


def quantized_linear(
    x: Tensor,
    bitmap: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    row_start: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As :func:`packed_linear`, for survivors stored as codes ``q`` of ``bits`` 8 or 4: ``W_ij = q_ij scale_ig``.

    ``codes`` uint8, two's complement: bytes, or halves of bytes, the lower one first, each row from a whole byte on.
    ``[rows, bytes]`` if each row has as many survivors, else ``[bytes]`` and ``row_start [rows + 1]`` int64, in bytes.
    ``scales [rows, ceil(cols / group)]`` in the dtype of ``x``; ``group``, a multiple of 64, is the number of columns
    that share one. Up to 16 tokens of bfloat16 or float16 may be rounded to 16 bits beside the largest ``|x|`` of 64 or
    128 columns: by at most ``max |x| / 32639``. In contrast to :func:`unpack_quantized`, ``W`` is not rounded to the
    dtype of ``scales``. Gradients flow to ``x`` and ``bias``, through the rounded ``W``.
    """
    return _product("quantized_linear", bias, x, bitmap, codes, scales, bits, group, row_start)


@torch.no_grad()
def unpack_quantized(
    bitmap: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, row_start: Tensor | None, cols: int
) -> Tensor:
    """The dense matrix ``[rows, cols]`` of :func:`quantized_linear`'s tensors, in the dtype of ``scales``.

    Weights are ``float32(q) * float32(scale)``, rounded to that dtype, and +0.0 where none is stored or ``q`` is 0.
    """
    weight: Tensor = registered().unpack_quantized(bitmap, codes, scales, bits, group, row_start, cols)
    return weight


def _product(name: str, bias: Tensor | None, x: Tensor, *matrix: Any) -> Tensor:
    """The op of this name, past its gradients where nothing wants them: they are written in Python, and asking there
    takes as long as the product with a small matrix."""
    compiling = torch.compiler.is_compiling()
    if not compiling:  # a compiler cannot trace the loading
        register_packed()
    op: Callable[..., Tensor] = getattr(torch.ops.ace_ext, name)
    if compiling or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return op(x, *matrix, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *matrix, bias)


def has_kernel(device_type: str) -> bool:
    """Whether the functions above run on devices of this type."""
    return device_type in ("cpu", "meta") or (device_type == "cuda" and _built_for_cuda())


@cache
def _built_for_cuda() -> bool:
    return build_info()["cuda"] is not None


@cache
def register_packed() -> None:
    """Registers the ops with torch, and the gradients of the products. Importing ``ace_ext.ops`` calls it.

    Raises:
        ImportError: the compiled module cannot be loaded; the message says how to rebuild it.
    """
    registered()
    torch.library.register_autograd("ace_ext::packed_linear", _backward, setup_context=_keep)
    torch.library.register_autograd("ace_ext::quantized_linear", _quantized_backward, setup_context=_keep_quantized)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bitmap, values, row_start, _ = inputs
    ctx.save_for_backward(bitmap, values, row_start)
    ctx.cols = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bitmap, values, row_start = ctx.saved_tensors
    wants_x, *_, wants_bias = ctx.needs_input_grad
    grad_x = grad @ registered().unpack_bitmap(bitmap, values, row_start, ctx.cols) if wants_x else None
    return grad_x, None, None, None, grad.sum(0) if wants_bias else None


def _keep_quantized(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bitmap, codes, scales, ctx.bits, ctx.group, row_start, _ = inputs
    ctx.save_for_backward(bitmap, codes, scales, row_start)
    ctx.cols = x.shape[1]


def _quantized_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bitmap, codes, scales, row_start = ctx.saved_tensors
    wants_x, *_, wants_bias = ctx.needs_input_grad
    grad_x = None
    if wants_x:
        unpack = registered().unpack_quantized
        grad_x = grad @ unpack(bitmap, codes, scales, ctx.bits, ctx.group, row_start, ctx.cols)
    return grad_x, None, None, None, None, None, None, grad.sum(0) if wants_bias else None
