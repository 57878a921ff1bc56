"""``AutoModelForCausalLM.from_pretrained`` of a packed folder: a quantizer of transformers.

transformers builds the model without weights and then reads its files. This quantizer removes the model's modules
before that step, and inserts those of :func:`ace_ext.runtime.loading.build_packed` after it. So no weight is ever
dense, and both ways of loading give the same model. Importing this module needs little besides transformers.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ace_ext.errors import InputError
from ace_ext.models._transformers import OWN_METHOD

_UNEXPECTED = "_keys_to_ignore_on_load_unexpected"
_TIED = "all_tied_weights_keys"
_INITIALIZED = "_is_hf_initialized"
_MARK = "_is_quantized"
_WEIGHTS = "transformers_weights"
"""The field of a configuration with the name of the weight file; transformers reads it after making the quantizer."""


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a packed folder: only its method."""

    def __init__(self, quant_method: str = OWN_METHOD, **_: Any) -> None:
        self.quant_method = quant_method


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed folders; see the module's docstring."""

    requires_calibration = False
    _folder: Path | None = None
    _device: str | int | torch.device = "cpu"

    def validate_environment(self, *args: Any, device_map: Any = None, **_: Any) -> None:
        """Refuses unsupported requests.

        Raises:
            InputError: the model is not packed yet, or its weights should be on several devices.
        """
        if not self.pre_quantized:
            raise InputError(
                "a model is packed by ace-prune pack, not while it is loaded; leave out quantization_config"
            )
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise InputError("device_map must name one device for a packed folder; leave it out")

    def update_tp_plan(self, config: Any) -> Any:
        """Sets the name of the weight file. transformers 5.0 and later call this before they look for the file."""
        return _name_weights(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """As :meth:`update_tp_plan`, for newer versions."""
        return _name_weights(config)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> Any:
        if not checkpoint_files:
            raise InputError("from_pretrained reads packed folders from transformers 5 on; use ace_ext.load_packed")
        self._folder = Path(checkpoint_files[0]).parent
        self._device = next(iter(device_map.values()), "cpu") if isinstance(device_map, dict) else "cpu"
        model._modules.clear()
        setattr(model, _INITIALIZED, True)  # its class would initialise modules that are not there
        setattr(model, _UNEXPECTED, _Patterns({"."}))  # every tensor of the file: transformers reads none
        setattr(model, _TIED, {})
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from ace_ext.models.skeleton import without_weights
        from ace_ext.runtime.loading import build_packed

        assert self._folder is not None  # set by the step before
        self.remove_quantization_config(model)
        for name in (_UNEXPECTED, _TIED, _INITIALIZED):
            delattr(model, name)
        model.config.__dict__.pop(_WEIGHTS, None)
        found: Any = build_packed(self._folder, lambda: without_weights(lambda: type(model)._from_config(model.config)))
        for module in found.modules():  # some families compute otherwise if their configuration has this mark
            getattr(module, "config", model.config).__dict__.pop(_MARK, None)
        found.to(self._device)
        model._parameters.update(found._parameters)
        model._buffers.update(found._buffers)
        model._modules.update(found._modules)
        model.config = found.config
        model.__dict__.update({_TIED: getattr(found, _TIED)} if hasattr(found, _TIED) else {})
        return model

    def is_serializable(self, *args: Any, **_: Any) -> bool:
        """The loaded model is an ordinary one: ``save_pretrained`` writes a dense folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are not trained."""
        return False


class _Patterns(set[str]):
    """Patterns that transformers 5.0 to 5.24 can concatenate with their own: lists in some versions, sets in others."""

    def __add__(self, others: list[str]) -> list[str]:
        return [*self, *others]


def register() -> None:
    """Tells transformers about packed folders: afterwards ``AutoModelForCausalLM.from_pretrained`` opens them. A second
    call does nothing."""
    if OWN_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(OWN_METHOD)(PackedConfig)
        register_quantizer(OWN_METHOD)(PackedQuantizer)


def _name_weights(config: Any) -> Any:
    from ace_ext.packed.files import SUFFIX

    folder = Path(config.name_or_path)
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    setattr(config, _WEIGHTS, names[0] if names else f"model{SUFFIX}")
    return config
