"""A smaller model of the same class: its configuration, its layout without memory, and how it replaces the model."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError, one_line
from ace_ext.models._transformers import empty_twin, generation_error, text_config, tie_weights_

CLOSE, CLOSE_IN_FLOAT32 = 0.05, 1e-3
"""Outputs that differ by no more than this share of their norm differ by rounding only."""
MOST_ROUNDING = 2.0
"""How many times the difference may be the one that other embeddings, by one rounding, make."""


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's language part, as ``config.json`` holds them."""
    settings: dict[str, Any] = text_config(model).to_dict()
    return settings


def standard_names(model: nn.Module) -> dict[str, str]:
    """The names that a configuration has for settings with a standard name, as ``n_head`` for
    ``num_attention_heads``, where they differ."""
    return dict(getattr(text_config(model), "attribute_map", None) or {})


def changed_config(model: nn.Module, changes: Mapping[str, Any]) -> Any:
    """The configuration of a model with other settings of its language part, made as ``config.json`` is read.

    Raises what transformers raises for settings that it refuses.
    """
    config: Any = model.config
    text = text_config(model)
    settings = config.to_dict()
    if text is config:
        settings |= changes
    else:
        part = next(name for name in settings if getattr(config, name, None) is text)
        settings[part] = {**settings[part], **changes}
    found = type(config).from_dict(copy.deepcopy(settings))
    found.name_or_path = getattr(config, "name_or_path", "")
    return found


def laid_out(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """A model of the same class with these changes, in evaluation mode. Its parameters are on the meta device; buffers
    that the class computes have data.

    Raises:
        InputError: the class cannot be built with these settings.
    """
    try:
        return empty_twin(model, changed_config(model, changes))
    except Exception as error:  # a class's own checks can raise anything
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        raise InputError(f"{type(model).__name__} cannot be built with {shown[:200]}: {one_line(error)}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by name, tied ones under each name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter and stored buffer by name, tied ones under each name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def fill_(smaller: nn.Module, tensors: Mapping[str, Tensor], like: nn.Module) -> None:
    """Gives a model that was laid out its parameters and stored buffers; they share the tensors' memory. Other buffers
    go to the device of ``like``.

    Raises:
        InputError: a tensor is missing, left over, or has another shape.
    """
    device = next(like.parameters()).device
    for module in smaller.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    try:
        smaller.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"the smaller {type(like).__name__} does not hold the weights: {one_line(error)}") from error
    tie_weights_(smaller)
    trained = {name: p.requires_grad for name, p in like.named_parameters(remove_duplicate=False)}
    for name, parameter in smaller.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained.get(name, True) and parameter.is_floating_point())


def take_over_(model: nn.Module, smaller: nn.Module) -> None:
    """Makes ``model`` the smaller one: its modules, weights, configuration, and what its class keeps of that, such as
    the number of experts. The object stays the same, with its hooks and its settings of generation."""
    smaller.train(model.training)
    model._modules, model._parameters, model._buffers = smaller._modules, smaller._parameters, smaller._buffers
    kept = {*vars(nn.Module()), "generation_config"}
    for name in vars(smaller).keys() - kept:
        setattr(model, name, getattr(smaller, name))


def few_tokens(batch: Mapping[str, Tensor], count: int = 16) -> Tensor:
    """The first tokens of the first sample of a batch, ``[1, count]`` at most."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask")
    row = 0 if mask is None else int(mask.sum(dim=1).argmax())
    seen = tokens[row] if mask is None else tokens[row][mask[row].bool()]
    return seen[None, :count]


def output_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """A model's logits, or the hidden states of one without a head, for ``tokens [1, seqlen]``."""
    output: Tensor = model(input_ids=tokens, use_cache=False)[0]
    return output


_MEND = "leave out {0}, or remove another number of them"


def output_without(name: str, smaller: nn.Module, tokens: Tensor) -> Tensor:
    """:func:`output_of` a model without some structures, which are called ``name``.

    Raises:
        InputError: it does not run.
    """
    try:
        return output_of(smaller, tokens)
    except Exception as error:  # a class's code and the kernels of torch can raise anything
        raise InputError(
            f"remove: {type(smaller).__name__} does not run without these {name}: {one_line(error)}; "
            + _MEND.format(name)
        ) from error


def check_same(
    name: str,
    model: nn.Module,
    smaller: nn.Module,
    tokens: Tensor,
    words: str = "without them it does not compute the same as with their weights zeroed",
) -> None:
    """Checks that the outputs of two models (:func:`output_of`) differ by rounding only, and that the smaller one
    writes text if the model does.

    How much that is depends on the model and on the order in which a processor adds. So if the outputs differ by more
    than :data:`CLOSE`, the model runs once more, with embeddings that differ by one rounding.

    Args:
        name: what cannot be removed if they differ by more.
        model: the model as it is now, so with its hooks.
        smaller: the other one.
        tokens: ``[1, seqlen]``.
        words: why it cannot be removed.

    Raises:
        InputError: they differ by more, or the smaller model does not run, or does not write text.
    """
    expected = output_of(model, tokens)
    found = output_without(name, smaller, tokens)
    refused = generation_error(smaller, tokens)
    if refused is not None and generation_error(model, tokens) is None:
        raise InputError(
            f"remove: {type(model).__name__} does not write text without these {name}: {one_line(refused)}; "
            + _MEND.format(name)
        ) from refused
    difference = _distance(found, expected)
    if difference <= (CLOSE_IN_FLOAT32 if next(model.parameters()).dtype == torch.float32 else CLOSE):
        return
    with _rounded_otherwise(model):
        rounding = _distance(output_of(model, tokens), expected)
    if not difference <= MOST_ROUNDING * rounding:  # also for NaN
        raise InputError(
            f"remove: {name} cannot be removed from this model: {words} (relative difference {difference:.1e}, of "
            f"rounding {rounding:.1e})"
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖``."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Makes about half of the entries of the embeddings smaller by the least that their dtype can express."""
    random = torch.Generator().manual_seed(0)

    def smaller(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        less = torch.randint(0, 2, output.shape, generator=random).to(output)
        return output * (1 - less * (torch.finfo(output.dtype).eps / 2))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(smaller).remove)
        yield
