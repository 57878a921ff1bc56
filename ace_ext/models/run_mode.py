"""The state of torch and of a model's modules while the model is pruned or trained. It does not depend on the
caller's."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError

_COMPILED = "_orig_mod"
"""Attribute of the module that ``torch.compile`` returns: the original module."""


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself, or the model inside a ``torch.compile`` wrapper. Both have the same parameters.

    Raises:
        InputError: the model is wrapped for several devices.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(f"model is wrapped in {type(model).__name__}; pass model.module")
    inner = getattr(model, _COMPILED, None)
    return inner if isinstance(inner, nn.Module) else model


@contextmanager
def run_mode(model: nn.Module, trainer: str | None = None) -> Iterator[None]:
    """Within this context results do not depend on the modes that the caller entered:

    - modules are in evaluation mode; afterwards each has the mode that it had;
    - gradients are recorded only if the code asks for them;
    - autocast is off: it would compute in another dtype than the model's. If a model turns it on for a part of its
      forward, casts are not cached: pruning changes the weights afterwards;
    - ``torch.inference_mode`` is as it was when the weights were made: weights that were made outside it can be
      trained, and weights that were made inside it can be changed only there;
    - compiled modules run uncompiled: a compiled forward calls no hooks of the modules in it.

    Args:
        model: the model.
        trainer: what trains the weights, for the message; None if nothing does.

    Raises:
        InputError: the weights to train were made in inference mode.
    """
    made_there = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made_there is not None and trainer is not None:
        raise InputError(
            f"{trainer} trains weights, which must be made outside torch.inference_mode (got {made_there} made in it); "
            "load the model outside it"
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(made_there is not None))
        stack.enter_context(torch.no_grad())  # last: leaving inference mode turns gradients on
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        stack.callback(torch.clear_autocast_cache)  # the caller's next forward must not read casts of dense weights
        if any(module._compiled_call_impl is not None or hasattr(module, _COMPILED) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context all modules are in evaluation mode; afterwards each has the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def modes_by_name(model: nn.Module) -> Iterator[None]:
    """For code that replaces a model's modules: afterwards each has the mode of the one that had its name before."""
    before = {name: module.training for name, module in model.named_modules()}
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = before.get(name, module.training)


def as_made_here(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it if it was made in inference mode. Outside that mode such a tensor cannot be saved for
    a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor


def in_dtype_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a model with those of floats in the dtype of its weights: a processor gives float32."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter requires gradients; afterwards each has its old setting."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
