"""The backward pass of attention in float32, for CPUs without instructions for half precision."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The parameters of ``scaled_dot_product_attention`` that it takes by position."""


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``scaled_dot_product_attention``, by name."""
    return dict(zip(_NAMES, args, strict=False)) | dict(kwargs)


def differentiates(given: Mapping[str, Any]) -> bool:
    """Whether :func:`attention` can stand for a call with these arguments, and gradients of it are wanted: there is no
    dropout, and a mask that needs no gradient."""
    parts = [given.get(name) for name in _NAMES[:3]]
    mask = given.get("attn_mask")
    return (
        torch.is_grad_enabled()
        and all(isinstance(part, Tensor) for part in parts)
        and any(part.requires_grad for part in parts if part is not None)
        and not given.get("dropout_p")
        and not (mask is not None and mask.requires_grad)
    )


def attention(given: Mapping[str, Any]) -> Tensor:
    """``scaled_dot_product_attention`` with the same result, bit for bit, and a backward pass in float32.

    torch's own backward pass multiplies half-precision numbers one by one on such CPUs. Here the forward pass is
    computed again in float32 for it. torch's takes 2.7 to 7 times as long as both (``benchmarks/float32_products.py``,
    an AMD EPYC with AVX2).

    Args:
        given: its arguments by name (:func:`arguments_of`).
    """
    options = {name: value for name, value in given.items() if name not in _NAMES[:3]}
    found: Tensor = _Attention.apply(*(given[name] for name in _NAMES[:3]), options)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return functional.scaled_dot_product_attention(query, key, value, **options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        options, mask = ctx.options, ctx.options.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            options = options | {"attn_mask": mask.float()}
        wanted = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            leaves = [
                part.detach().float().requires_grad_(needed)
                for part, needed in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            output = functional.scaled_dot_product_attention(*leaves, **options)
        found = iter(torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], gradient.float()))
        return *(next(found).to(gradient.dtype) if needed else None for needed in wanted), None
