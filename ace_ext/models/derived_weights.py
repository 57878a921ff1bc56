"""Refuses Linears whose output is not computed from their own weight: the model would not use the pruned weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from ace_ext.errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights that can be pruned."""


def refuse_derived(block: str, module: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Refuses Linears whose weight or output is computed from other tensors, for example by ``weight_norm``,
    ``torch.nn.utils.prune`` or an adapter. The model would not use the pruned weight.

    Raises:
        InputError: naming the first.
    """
    for child, linear in linears.items():
        if is_parametrized(linear) or not isinstance(linear._parameters.get("weight"), nn.Parameter):
            raise InputError(
                f"{block}.{child}: its weight is computed from other tensors (parametrization, weight_norm or "
                "torch.nn.utils.prune); make it a plain parameter first (remove_parametrizations, prune.remove)"
            )
        if _computes_otherwise(linear):
            raise InputError(
                f"{block}.{child}: its output is not that of its weight (a hook, or a forward of its own, computes "
                "another); remove it first, or pass it in skip"
            )
    for name, part in module.named_modules():
        if isinstance(getattr(part, "base_layer", None), nn.Module):
            raise InputError(f"{block}.{name} is a layer with an adapter; merge it first (merge_and_unload of PEFT)")


@torch.no_grad()
def _computes_otherwise(linear: nn.Linear) -> bool:
    """Whether the output of a Linear with hooks or a forward of its own differs from that of its weight and bias, for
    one random input. Both are rounded alike, so equal computations differ by almost nothing."""
    own = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    readable = not linear.weight.is_meta and linear.weight.dtype in DTYPES
    if not readable or not (own or linear._forward_hooks or linear._forward_pre_hooks):
        return False
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    expected = functional.linear(x, linear.weight, linear.bias)
    try:
        found = linear(x)
    except RuntimeError:  # it takes inputs of another shape, like a Linear in groups
        return True
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return True
    difference = (found.float() - expected.float()).norm()
    return not bool(difference <= 0.01 * expected.float().norm())
