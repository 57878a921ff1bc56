"""Calibration as :func:`ace_ext.prune_model` takes it, made into the arguments of the model's calls."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ace_ext.data.requests import check_data, check_positions, check_tokens
from ace_ext.errors import InputError, suggestion
from ace_ext.models._transformers import decoder_of, knows_argument, main_input, predicts_tokens, takes_argument
from ace_ext.models.run_mode import as_made_here, in_dtype_of
from ace_ext.pruning.config import PruneConfig

Batches: TypeAlias = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Calibration: tokens ``[nsamples, seqlen]``, the inputs of one call of the model, or several of either."""


def model_inputs(
    model: nn.Module, batches: Batches, config: PruneConfig, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches as arguments of the model's calls, on the device. One tensor is split into batches of at most
    ``batch_tokens`` tokens (an option of ``collect``), but at least one sample; batches that are empty, or nothing but
    padding, are left out.

    Raises:
        InputError: tokens or other inputs that no call of the model takes.
    """
    plain = predicts_tokens(model)
    if isinstance(batches, Tensor):
        check_data("calibration tokens", batches)
        if not plain and main_input(model) != "input_ids":
            raise InputError(
                f"{type(model).__name__} reads {main_input(model)}: give calibration as dicts of its inputs, as its "
                f"processor returns them (got a tensor {list(batches.shape)})"
            )
        if batches.dim() != 2:
            raise InputError(f"calibration tokens must be [nsamples, seqlen] (got shape {list(batches.shape)})")
        batches = torch.split(batches, config.batch_samples(batches.shape[1]))
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):  # a torch Dataset has the latter
        raise InputError(f"calibration must be tokens, or batches of a model's inputs (got {type(batches).__name__})")
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        inputs = _checked({"input_ids": batch} if isinstance(batch, Tensor) else batch, plain)
        if not plain:
            _check_other(model, inputs)
            inputs = in_dtype_of(model, inputs)
        else:
            _check_names(model, inputs)
        if "input_ids" in inputs:
            check_tokens(model, inputs["input_ids"])
            check_positions(model, inputs["input_ids"].shape[1])
        if _counts(inputs):
            yield {name: as_made_here(value.to(device)) for name, value in inputs.items()}


def text_inputs(model: nn.Module, tokens: Tensor, config: PruneConfig) -> Batches:
    """Windows of text ``[nsamples, seqlen]`` as a model reads them: as they are; or, with an encoder and a decoder, the
    first half of each by the encoder, and the second by the decoder."""
    if predicts_tokens(model) or decoder_of(model) is None:
        return tokens
    from ace_ext.data.held_out_inputs import text_samples  # imported here: few models need it

    return text_samples(model, tokens, config.batch_samples(tokens.shape[1]))


def _counts(inputs: dict[str, Tensor]) -> bool:
    """Whether a batch has a token that is not padding."""
    first = inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))
    mask = inputs.get("attention_mask")
    return bool(first.numel()) and (mask is None or bool(mask.any()))


def _check_names(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Refuses an input that no module of a causal language model has: it would be ignored. A misspelt attention_mask
    would let padding count. Tokenizers return token_type_ids also for models without them."""
    unknown = [str(name) for name in inputs if not knows_argument(model, name) and name != "token_type_ids"]
    if unknown:
        meant = suggestion(unknown[0], inspect.signature(model.forward).parameters)
        raise InputError(
            f"calibration input {unknown[0]} is none of {type(model).__name__}'s{meant}; correct its name or leave it "
            "out"
        )


def _check_other(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Checks the inputs of a model that is no causal language model."""
    for name, value in inputs.items():
        if not takes_argument(model, name):
            raise InputError(f"calibration input {name} is none of {type(model).__name__}'s; leave it out")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"calibration input {name} must be finite (it holds NaN or infinity)")
    if "input_ids" not in inputs:
        _check_mask(main_input(model), inputs)
    decoder, ids = decoder_of(model), inputs.get("decoder_input_ids")
    if decoder is not None and ids is not None:
        shapes = [list(inputs[name].shape) for name in _DECODED if name in inputs]
        if ids.dim() != 2 or any(shape != shapes[0] for shape in shapes):
            raise InputError(
                f"calibration {' and '.join(_DECODED)} must be [batch, seqlen], of one shape (got {shapes})"
            )
        check_tokens(decoder, ids)
        check_positions(model, ids.shape[1])


_DECODED = ("decoder_input_ids", "decoder_attention_mask")


def _check_mask(main: str, inputs: dict[str, Tensor]) -> None:
    """Checks the mask of a model's main input, of this name."""
    mask, read = inputs.get("attention_mask"), inputs.get(main)
    if mask is None or read is None:
        return
    if mask.dim() != 2 or len(mask) != len(read) or mask.shape[1] not in read.shape[1:]:
        raise InputError(
            f"calibration attention_mask must be [batch, length], as {main} {list(read.shape)} (got {list(mask.shape)})"
        )


def _checked(batch: Any, plain: bool) -> dict[str, Tensor]:
    """A dict of inputs as a tokenizer or a processor returns it, which may be a class of its own. Entries that
    are None are left out. ``plain``: of a causal language model, which needs ``input_ids``."""
    if not isinstance(batch, Mapping):
        raise InputError(
            f"calibration batches must be tensors of tokens or dicts of the model's inputs (got {type(batch).__name__})"
        )
    inputs = {name: value for name, value in batch.items() if value is not None}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"calibration inputs must be tensors (got {type(value).__name__} for {name}); "
                'call the tokenizer or processor with return_tensors="pt"'
            )
        check_data(f"calibration input {name}", value)
    if not inputs or (plain and "input_ids" not in inputs):
        raise InputError(f"calibration inputs must have input_ids (got {', '.join(map(str, inputs)) or 'nothing'})")
    tokens, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if tokens is None:
        return inputs
    if tokens.dim() != 2:
        raise InputError(f"calibration input_ids must be [batch, seqlen] (got shape {list(tokens.shape)})")
    if mask is not None and mask.shape != tokens.shape:
        raise InputError(
            f"calibration attention_mask must have the shape of input_ids, {list(tokens.shape)} "
            f"(got {list(mask.shape)})"
        )
    return inputs
