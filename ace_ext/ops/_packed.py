"""Products with a packed matrix, whose zeros are not stored. Contract: ``csrc/ops/packed.h``."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ace_ext.ops._extension import build_info, registered


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
    if not torch.compiler.is_compiling():  # which cannot trace the loading
        register_packed()
    out: Tensor = torch.ops.ace_ext.packed_linear(x, bitmap, values, row_start, bias)
    return out


@torch.no_grad()
def unpack_bitmap(bitmap: Tensor, values: Tensor, row_start: Tensor | None, cols: int) -> Tensor:
    """The dense matrix ``[rows, cols]`` of :func:`packed_linear`'s tensors; finite weights keep their bits."""
    weight: Tensor = registered().unpack_bitmap(bitmap, values, row_start, cols)
    return weight


def has_kernel(device_type: str) -> bool:
    """Whether :func:`packed_linear` and :func:`unpack_bitmap` run on devices of this type."""
    return device_type in ("cpu", "meta") or (device_type == "cuda" and _built_for_cuda())


@cache
def _built_for_cuda() -> bool:
    return build_info()["cuda"] is not None


@cache
def register_packed() -> None:
    """Registers the ops with torch, and the gradient of :func:`packed_linear`. Importing ``ace_ext.ops`` calls it.

    Raises:
        ImportError: the compiled module cannot be loaded; the message says how to rebuild it.
    """
    registered()
    torch.library.register_autograd("ace_ext::packed_linear", _backward, setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bitmap, values, row_start, _ = inputs
    ctx.save_for_backward(bitmap, values, row_start)
    ctx.cols = x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bitmap, values, row_start = ctx.saved_tensors
    wants_x, *_, wants_bias = ctx.needs_input_grad
    grad_x = grad @ registered().unpack_bitmap(bitmap, values, row_start, ctx.cols) if wants_x else None
    return grad_x, None, None, None, grad.sum(0) if wants_bias else None
