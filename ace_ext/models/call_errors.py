"""What a class raises for inputs that do not suit it, as an error in words."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError, one_line
from ace_ext.models._transformers import decoder_of

_DECODED = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Inputs of a decoder. Many models make the first of them from the last."""


@contextmanager
def explained(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[None]:
    """Within this context an error of a call of the model is an :class:`InputError` about its inputs."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        if type(model).forward is nn.Module.forward:
            parts = [f"model.{name}" for name, part in model.named_children() if hasattr(part, "config")]
            raise InputError(
                f"{type(model).__name__} cannot be called: it only joins models; prune one of them, "
                f"{' or '.join(parts) or 'none was found'}"
            ) from error
        given = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
        lacks = decoder_of(model) is not None and not any(name in batch for name in _DECODED)
        mend = f"; a model with a decoder also needs {' or '.join(_DECODED)}" if lacks else ""
        reason = one_line(error, 300)
        raise InputError(
            f"calibration inputs do not suit {type(model).__name__} (got {given}): {type(error).__name__}: "
            f"{reason}{mend}"
        ) from error
