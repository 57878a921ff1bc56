"""The plug-in for vLLM, entry point ``vllm.general_plugins``: it serves packed folders.

vLLM calls :func:`register` in each of its processes. It then knows the ``quant_method`` of a packed folder's
``config.json``, and its loader reads packed files. Layers whose weights are packed multiply from them; a weight that
the files hold dense stays dense. Loading goes through vLLM's own loaders (:mod:`ace_ext.serving.stored`,
:mod:`ace_ext.serving.slots`), so that renamed, merged and sharded weights are handled as in any other model.

Written for vLLM 0.32. Run on CPUs; not run on a GPU.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as LOADERS
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.utils import set_weight_attrs

from ace_ext.errors import InputError
from ace_ext.fingerprint import fingerprint_of_files
from ace_ext.models._transformers import OWN_METHOD
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.serving.experts import ExpertOptions, Mixture
from ace_ext.serving.product import product_of
from ace_ext.serving.slots import Slot
from ace_ext.serving.stored import check, weights_of


class PackedMethod(LinearMethodBase):  # type: ignore[misc]
    """A Linear, an embedding or a head: packed if the files hold a packed weight for it, else dense."""

    def __init__(self, dense: Any) -> None:
        self._dense = dense

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """A slot for the rows of all parts that are merged in this layer."""
        rows, cols = sum(output_partition_sizes), input_size_per_partition
        slot = _slot((rows, cols), params_dtype, {"output_dim": 0, "input_dim": 1, **attributes})
        layer.register_parameter("weight", slot)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """A head with the weight of an embedding, which is built once."""
        layer.weight, layer.tied_to = embed_tokens.weight, (embed_tokens,)  # in a tuple: it is no part of the head
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Builds the weight from its pieces, or takes that of the embedding."""
        if "product" in layer._modules:  # a tied head came first
            return
        slot: Any = layer.weight
        product: nn.Module | None = None
        for owner in getattr(layer, "tied_to", ()):
            if isinstance(slot, Slot):
                self.process_weights_after_loading(owner)
            slot, product = owner.weight, owner._modules.get("product")
            layer.weight = slot
        if isinstance(slot, Slot):
            (weight,) = _matrices(slot, f"{layer.prefix}.weight")
            product = None if isinstance(weight, Tensor) else product_of(weight, slot.device)
            left = weight.to(slot.device) if product is None else torch.empty(0, dtype=slot.dtype, device=slot.device)
            layer.weight = nn.Parameter(left, requires_grad=False)
        layer.register_module("product", product)
        if product is None:  # also a head that is tied to the embedding
            self._dense.process_weights_after_loading(layer)

    def embedding(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The rows of tokens."""
        product: Any = layer.product
        found: Tensor = self._dense.embedding(layer, tokens) if product is None else product.rows_of(tokens)
        return found

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + bias``."""
        product: Any = layer.product
        found: Tensor = self._dense.apply(layer, x, bias) if product is None else product(x, bias)
        return found


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of a mixture, each multiplied from its own weights, packed or dense."""

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Slots for all experts, and their biases if there are any."""
        inner = intermediate_size_per_partition
        up = 2 * inner if self.moe.is_act_and_mul else inner
        layer.register_parameter("w13_weight", _slot((num_experts, up, hidden_size), params_dtype, attributes))
        layer.register_parameter("w2_weight", _slot((num_experts, hidden_size, inner), params_dtype, attributes))
        for name, size in (("w13_bias", up), ("w2_bias", hidden_size)) if self.moe.has_bias else ():
            bias = nn.Parameter(torch.zeros(num_experts, size, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(bias, attributes)
            layer.register_parameter(name, bias)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Builds the experts' weights from their pieces."""
        settings = ApplyMoEActivationConfig.from_configs(self.moe, self.get_fused_moe_quant_config(layer))
        options = ExpertOptions(
            _activation(layer.activation, settings, layer.w13_weight.device),
            layer.apply_router_weight_on_input,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None) if self.moe.tp_rank == 0 else None,  # ranks add their outputs
            layer.expert_map,
        )
        up, down = layer.w13_weight, layer.w2_weight
        name = layer.layer_name
        layer.mixture = Mixture(
            _matrices(up, f"{name}.w13_weight"), _matrices(down, f"{name}.w2_weight"), options, up.device
        )
        for weight in ("w13_weight", "w2_weight"):
            setattr(layer, weight, nn.Parameter(torch.empty(0, dtype=up.dtype, device=up.device), requires_grad=False))

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """The parameters of gated activations; nothing is quantized."""
        return FusedMoEQuantConfig.make(
            gemm1_alpha=layer.swiglu_alpha, gemm1_beta=layer.swiglu_beta, gemm1_clamp_limit=layer.swiglu_limit
        )

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """The weighted sum of the chosen experts' outputs; shared experts are multiplied by vLLM's runner."""
        found: Tensor = layer.mixture(x, topk_weights, topk_ids)
        return found


class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """The ``quantization_config`` of a packed folder: only its method. What is packed, and how, is in the files."""

    def get_name(self) -> str:
        """The ``quant_method``."""
        return OWN_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of packed weights."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU; the extension is built for this one and later ones."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No other file."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """Of the configuration's entry."""
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks the files before any engine process starts."""
        try:
            _check(model_name)
        except InputError as error:
            _stop(error)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Packed methods for Linears, embeddings, heads and experts."""
        if isinstance(layer, LinearBase):
            return PackedMethod(UnquantizedLinearMethod())
        if isinstance(layer, VocabParallelEmbedding):  # heads too
            return PackedMethod(UnquantizedEmbeddingMethod())
        if isinstance(layer, RoutedExperts):
            return PackedExpertsMethod(layer.moe_config)
        return None


class PackedLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader, which also reads packed folders: their files' names differ from those that it knows."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name.

        Raises:
            InputError: vLLM loads the weights of a running model again, which packed ones do not allow. It is raised
                before the model is changed, which goes on as it was.
        """
        if model_config.quantization != OWN_METHOD:
            found: Iterator[tuple[str, Tensor]] = super().get_all_weights(model_config, model)
            return found
        if any(hasattr(module, "product") or hasattr(module, "mixture") for module in model.modules()):
            raise InputError("the weights of a packed model cannot be loaded again while it is served; start it anew")
        self.counter_before_loading_weights = time.perf_counter()  # for vLLM's log
        return weights_of(model_config.model)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Loads all tensors. Notes in a packed folder's configuration what its files hold.

        vLLM keeps a compiled model by a hash of the configuration. Which weights are packed, and how, is compiled too:
        without the note, another folder of the same name would get the first one's code.

        A parameter that the files do not hold is an error, as in a dense model. vLLM itself leaves it as it was
        allocated if there is a quantization.
        """
        packed = model_config.quantization == OWN_METHOD
        try:
            if packed:
                files = PackedShards(model_config.model).files
                model_config.hf_config.ace_ext_files = fingerprint_of_files(files)
                self.enable_weights_track: bool | None = self.enable_weights_track is not False
            elif is_packed(model_config.model):
                raise InputError(
                    f"{model_config.model} is packed, but its quantization is {model_config.quantization!r} by its "
                    f'configuration; "quant_method" in config.json must be "{OWN_METHOD}": pack the model again'
                )
            super().load_weights(model, model_config)
        except InputError as error:
            _stop(error)
        except ValueError as error:
            if not packed:
                raise
            _stop(InputError(f"{model_config.model} does not fit its config.json; pack the model again ({error})"))

    def download_model(self, model_config: Any) -> None:
        """Nothing for a packed folder, which is on this machine."""
        if not is_packed(model_config.model):
            super().download_model(model_config)


def register() -> None:
    """Tells vLLM about packed folders. A second call does nothing."""
    if LOADERS["auto"] is PackedLoader:
        return
    register_quantization_config(OWN_METHOD)(PackedConfig)
    for name in ("auto", "hf", "safetensors"):  # not by register_model_loader, which warns of a replaced loader
        LOADERS[name] = PackedLoader


_check = cache(check)  # vLLM makes its configuration more than once
""":func:`ace_ext.serving.stored.check`, once for each folder of this process."""


def _slot(shape: tuple[int, ...], dtype: torch.dtype, attributes: dict[str, Any]) -> nn.Parameter:
    slot = nn.Parameter(Slot(shape, dtype, torch.get_default_device()), requires_grad=False)
    set_weight_attrs(slot, attributes)
    return slot


def _matrices(slot: Slot, name: str) -> list[Any]:
    try:
        return slot.matrices(name)
    except InputError as error:
        _stop(error)


def _activation(activation: Any, settings: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The activation of experts. vLLM has no kernel of GPT-OSS's for CPUs, but its formula."""
    if activation.value == "swigluoai" and device.type == "cpu":
        formula: Callable[[Tensor], Tensor] = SwigluOAIAndMul().forward_native
        return formula
    return partial(_activate, activation, settings)


def _activate(activation: Any, settings: Any, x: Tensor) -> Tensor:
    out = x.new_empty(len(x), x.shape[1] // 2 if activation.is_gated else x.shape[1])
    found: Tensor = apply_moe_activation(activation, out, x, activation_config=settings)
    return found


def _stop(error: InputError) -> NoReturn:
    """Ends the process with one line if it is vLLM's own: its command, or a process that it started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m vllm.entrypoints...`
    own = Path(sys.argv[0]).name == "vllm" or getattr(spec, "name", "").startswith("vllm.")
    if own or multiprocessing.parent_process() is not None:
        print(f"ace_ext: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    raise error
