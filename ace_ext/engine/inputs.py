"""Calibration as :func:`ace_ext.prune_model` takes it, made into the arguments of the model's calls."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ace_ext.data.requests import check_positions, check_tokens
from ace_ext.errors import InputError
from ace_ext.models.run_mode import as_made_here
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
    if isinstance(batches, Tensor):
        if batches.dim() != 2:
            raise InputError(f"calibration tokens must be [nsamples, seqlen] (got shape {list(batches.shape)})")
        batches = torch.split(batches, config.batch_samples(batches.shape[1]))
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        inputs = _checked({"input_ids": batch} if isinstance(batch, Tensor) else batch)
        check_tokens(model, inputs["input_ids"])
        check_positions(model, inputs["input_ids"].shape[1])
        if inputs["input_ids"].numel() and bool(inputs.get("attention_mask", inputs["input_ids"].new_ones(1)).any()):
            yield {name: as_made_here(value.to(device)) for name, value in inputs.items()}


def _checked(batch: Any) -> dict[str, Tensor]:
    """A dict of inputs as a tokenizer or a processor returns it, which may be a class of its own. Entries that
    are None are left out."""
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
    if "input_ids" not in inputs:
        raise InputError(f"calibration inputs must have input_ids (got {', '.join(inputs) or 'nothing'})")
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if tokens.dim() != 2:
        raise InputError(f"calibration input_ids must be [batch, seqlen] (got shape {list(tokens.shape)})")
    if mask is not None and mask.shape != tokens.shape:
        raise InputError(
            f"calibration attention_mask must have the shape of input_ids, {list(tokens.shape)} "
            f"(got {list(mask.shape)})"
        )
    return inputs
