"""The names of transformers that are private or differ between its versions, each with what it is used for.

The rest of ace_ext uses only the documented names of transformers. transformers is slow to import, so it is imported
inside the functions that need it.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError

_FLOAT32_MODULES_STRICT = "_keep_in_fp32_modules_strict"
_FLOAT32_MODULES = "_keep_in_fp32_modules"
"""Attributes of a model's class: parts of the names of parameters that are loaded as float32. The first list applies to
float16 and bfloat16, the second to float16 only."""

_ATTENTION = "_attn_implementation"
"""Attribute of a configuration: the code that computes attention. ``"eager"`` allocates the attention weights of all
tokens, and needs a mask where other code needs none."""

EXPERTS = "_experts_implementation"
"""Attribute of a configuration: the code that computes fused experts. ``"eager"`` is a loop over experts."""

_LEFT_OUT = "_keys_to_ignore_on_load_unexpected"
"""Attribute of a model: patterns of stored tensors that a model of its class does not read."""

_STORED_ONCE = ("rotary_emb.inv_freq", "position_ids")
"""Buffers that older versions stored, and newer ones compute."""

_CACHES = ("cache", "past_key_values")
"""The key and value cache in a model's output and in its arguments: the newer and the older name."""

_CONVERSIONS = "_weight_conversions"
"""Attribute of a model that transformers has loaded: the conversions that its files needed."""

_QUANTIZATION_MARKS = {"hf_quantizer": None, "is_quantized": False, "quantization_method": None}
"""Attributes of a model that was loaded from quantized weights, with their values in a plain model."""


OLDEST = "5.16"
"""The oldest release of transformers with which the tests pass; pyproject.toml and .ci/oldest.txt name it too."""


def check_version() -> None:
    """Raises :class:`ace_ext.InputError` if the installed transformers is older than :data:`OLDEST`."""
    from packaging.version import Version  # transformers requires it too

    found = Version(version("transformers"))
    if found.release < Version(OLDEST).release:
        raise InputError(f"transformers {found} is too old: ace_ext needs {OLDEST}; pip install -U transformers")


def model_class(config: Any) -> Any:
    """The class whose ``from_pretrained`` loads the checkpoint of a configuration. It is the class that
    ``architectures`` names, so that a classifier or a model without an LM head keeps its class. If transformers has no
    such class for this configuration, for example because the code comes with the checkpoint, it is
    ``AutoModelForCausalLM``, or ``AutoModel`` for a configuration that no causal language model has."""
    import transformers

    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own_code:
        return transformers.AutoModelForCausalLM  # it chooses between that code and its own
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            own = getattr(found, "config_class", None)
            if own is not None and isinstance(config, own):
                return found
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    other = "AutoModel" in own_code or type(config) in transformers.MODEL_MAPPING
    return transformers.AutoModel if other and not causal else transformers.AutoModelForCausalLM


def model_of(config: Any, dtype: torch.dtype, remote_code: bool) -> nn.Module:
    """A model of :func:`model_class` with random weights of ``dtype``. ``remote_code``: code of the checkpoint may
    run."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind = model_class(config)
    if kind in (AutoModel, AutoModelForCausalLM):
        model: nn.Module = kind.from_config(config, dtype=dtype, trust_remote_code=remote_code)
    else:
        model = kind._from_config(config, dtype=dtype)  # AutoModelForCausalLM.from_config calls this
    return model


def _implementations(config: Any, attribute: str) -> dict[str, Any]:
    """``attribute`` of a configuration under ``""`` and of each of its parts under their names, which may differ: a
    language part can have code that its vision part lacks."""
    names = getattr(config, "sub_configs", None) or {}
    parts = {name: part for name in names if (part := getattr(config, name, None)) is not None}
    return {"": getattr(config, attribute, None)} | {
        name: _implementations(part, attribute) for name, part in parts.items()
    }


def empty_twin(model: nn.Module, config: Any) -> nn.Module:
    """A model of the class of ``model`` with another configuration, in evaluation mode. Parameters are on the meta
    device, tied ones tied; buffers that are computed have data. Attention and experts are computed by the same code in
    each part of the model.

    Raises what transformers raises for a configuration that it cannot build.
    """
    from accelerate import init_empty_weights

    kind: Any = type(model)
    dtype = next(model.parameters()).dtype
    attention, experts = (_implementations(model.config, attribute) for attribute in (_ATTENTION, EXPERTS))
    with init_empty_weights(include_buffers=False), no_init_weights():
        twin: nn.Module = kind._from_config(
            config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
        )
    tie_weights_(twin)
    return twin.eval()


def input_embedding(model: nn.Module) -> nn.Module:
    """The module of a model that turns token ids into hidden states; its weight is ``[vocabulary, d_model]``."""
    embedding: nn.Module = _method(model, "get_input_embeddings")()
    return embedding


def token_embedding(model: nn.Module) -> nn.Module | None:
    """:func:`input_embedding`, or None for a module that does not say which one it is."""
    try:
        return input_embedding(model)
    except (AttributeError, NotImplementedError):
        return None


def embedding_weight(model: nn.Module) -> Tensor:
    """The weight ``[vocabulary, d_model]`` of :func:`input_embedding`."""
    weight: Any = input_embedding(model).weight  # a packed one is no parameter
    return cast(Tensor, weight)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module of a model that turns hidden states into logits; None in a model without one."""
    try:
        head: nn.Module | None = _method(model, "get_output_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return head


def tie_weights_(model: nn.Module) -> None:
    """Makes the shared weights of a model one parameter again, such as those of a tied LM head and embedding."""
    _method(model, "tie_weights")()


def take_generation_config_(model: nn.Module, folder: str) -> None:
    """Gives a model the settings of its folder's ``generation_config.json``, if there is one, and the folder's name, as
    ``from_pretrained`` does."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = folder  # type: ignore[assignment,union-attr]


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part. In a multimodal model it is a part of the model's configuration."""
    return _method(model.config, "get_text_config")()


def text_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that text goes through, with its name in the model. It is the decoder of a model that also
    has an encoder or a vision tower, else the whole model."""
    if hasattr(model, "get_decoder"):
        found = _method(model, "get_decoder")()
        for name, module in model.named_modules():
            if module is found and any(isinstance(part, nn.ModuleList) for part in module.modules()):
                return name, module
    return "", model


def attends_eagerly(model: nn.Module) -> bool:
    """Whether a model's attention allocates its weights, ``[batch, heads, seqlen, seqlen]``."""
    return bool(getattr(model.config, _ATTENTION) == "eager")


def main_input(model: nn.Module | type[nn.Module]) -> str:
    """The name of the main argument of the forward of a model, or of a class: ``input_ids`` for text."""
    return str(getattr(model, "main_input_name", "input_ids"))


def has_encoder(model: nn.Module) -> bool:
    """Whether a model consists of an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_encoder(model: nn.Module) -> bool:
    """Whether each token of a model also attends to later ones, so that the model does not predict the next token: some
    modules have ``is_causal``, and it is False in all of them. Attention without ``is_causal`` counts as causal."""
    causal = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(causal) and not any(causal)


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a model is a causal language model, or contains one that reads what other parts of it see: it has an LM
    head or causal attention, and does not consist of encoders, or of an encoder and a decoder."""
    if has_encoder(model):
        return False
    text = [module for name, module in model.named_modules() if not hears_or_sees(name)]
    causal = [bool(module.is_causal) for module in text if hasattr(module, "is_causal")]
    return any(causal) or (not causal and output_head(model) is not None)


_OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech")


def hears_or_sees(name: str) -> bool:
    """Whether, by its name, a module or a list of a model is of a part that text does not go through."""
    return bool(_OTHER_SENSES.search(name))


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of a model that consists of an encoder and a decoder; None for other models."""
    if not has_encoder(model) or not hasattr(model, "get_decoder"):
        return None
    found: nn.Module = _method(model, "get_decoder")()
    return found


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model has an argument of this name, or of a language model may have: one that takes any
    name."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (anything and predicts_tokens(model))


def knows_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model, or of a module in it, has an argument of this name. A forward that takes any name
    passes it on to its modules, and all of them ignore a name that is misspelt."""
    kinds = {type(module).forward for module in model.modules()}
    return any(name in inspect.signature(forward).parameters for forward in kinds)


def plain_call(model: nn.Module) -> dict[str, Any]:
    """The arguments of a call that keeps no keys and values of attention for later calls."""
    return {"use_cache": False} if takes_argument(model, "use_cache") else {}


def generation_error(model: nn.Module, tokens: Tensor) -> Exception | None:
    """What a model raises when it writes two tokens after ``tokens [1, seqlen]``, the second with its cache; None if it
    writes them, or is no model that writes text."""
    from transformers import GenerationConfig

    writer: Any = model
    if not hasattr(model, "can_generate") or not writer.can_generate():
        return None
    two = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    try:
        writer.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=two)
    except Exception as error:  # a class's code can raise anything
        return error
    return None


_FRAME_MASK, _FRAMES = "_get_feature_vector_attention_mask", "_get_feat_extract_output_lengths"
"""Methods of speech models: the mask of the frames that the blocks see, given that of samples; and the number of frames
that a number of samples gives."""


def frame_mask(model: nn.Module, mask: Tensor, frames: int) -> Tensor | None:
    """The mask ``[batch, frames]`` of the frames that the blocks of a speech model see; None if the model's class does
    not say which they are.

    Args:
        model: the model.
        mask: ``[batch, samples]``, of what its processor returned.
        frames: how many frames the blocks see.
    """
    for module in model.modules():
        if hasattr(module, _FRAME_MASK):
            found: Tensor = getattr(module, _FRAME_MASK)(frames, mask.long())
            return found.bool()
    for module in model.modules():
        if hasattr(module, _FRAMES):
            lengths = torch.as_tensor(getattr(module, _FRAMES)(mask.long().sum(-1)))
            if int(lengths.max()) <= frames:
                return torch.arange(frames, device=mask.device) < lengths[:, None]
    return None


def is_left_out(model: nn.Module, name: str) -> bool:
    """Whether transformers ignores a stored tensor without a message: the model's class lists it, or it is a buffer
    that older versions stored."""
    patterns = set(getattr(model, _LEFT_OUT, None) or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    patterns |= {rf"{own}$" for own in _STORED_ONCE if any(buffer.endswith(own) for buffer in buffers)}
    return any(re.search(pattern, name) for pattern in patterns)


def is_computed(model: nn.Module, name: str) -> bool:
    """Whether the model's class computes a parameter, and never saves it, such as Marian's sinusoids."""
    return any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ())


def initialise_(model: nn.Module, name: str) -> None:
    """Gives the parameters and buffers of the module with this name, without its children, the values that a new model
    has. As in transformers, the innermost model that the module is a part of knows them."""
    module = model.get_submodule(name)
    path = name.split(".") if name else []
    owners = (model.get_submodule(".".join(path[:length])) for length in range(len(path), -1, -1))
    owner = next(owner for owner in owners if hasattr(owner, "_init_weights"))
    owner._init_weights(module)  # type: ignore[operator]


def _method(owner: object, name: str) -> Callable[[], Any]:
    """A method that transformers' models and configurations have, and ``nn.Module`` does not."""
    method: Callable[[], Any] = getattr(owner, name)
    return method


def no_init_weights() -> contextlib.AbstractContextManager[object]:
    """Within this context the weights of new models are not initialised. Even on the meta device this takes most of the
    time."""
    from transformers.initialization import no_init_weights as found

    manager: contextlib.AbstractContextManager[object] = found()
    return manager


def quiet_stderr() -> contextlib.AbstractContextManager[object]:
    """Hides the progress bars of unpacking a GGUF file. No setting of transformers turns them off."""
    return contextlib.redirect_stderr(io.StringIO())


def dequantize_options() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that unpack a GGUF file.

    ``GgufConfig``: newer versions keep GGUF weights packed unless it says otherwise. Older ones always unpack, and do
    not have it.
    """
    with contextlib.suppress(ImportError):
        from transformers import GgufConfig

        return {"quantization_config": GgufConfig(dequantize=True)}
    return {}


OWN_METHOD, COMPRESSED_METHOD = "ace_ext", "compressed-tensors"
"""The ``quant_method`` of a packed folder, whose matrices are read as dense ones, and of another library's form."""


def quantization_of(config: Any) -> str | None:
    """The quantization method of a configuration's weights: ``"quantized"`` if it has no name, None for plain weights.
    ``quantization_config`` is a dictionary in a configuration that was read, and an object in that of a loaded
    model."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
    method = values.get("quant_method") or "quantized"
    return str(getattr(method, "value", method))


def forget_quantization_(model: nn.Module) -> None:
    """Removes the marks of quantized weights from an unpacked model. ``save_pretrained`` refuses a model that has
    them."""
    if quantization_of(model.config) is not None:
        delattr(model.config, "quantization_config")
    for mark, plain in _QUANTIZATION_MARKS.items():
        if hasattr(model, mark):
            setattr(model, mark, plain)


def stays_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads the parameter ``name`` as float32 although ``dtype`` (float16, bfloat16) is requested.
    The lists of the model's class name such parameters."""
    parts = set(getattr(model, _FLOAT32_MODULES_STRICT, None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, _FLOAT32_MODULES, None) or ())
    return any(f".{part}." in f".{name}." for part in parts)


def saved_as(model: nn.Module, parameters: dict[str, Tensor], stored: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors that ``save_pretrained`` would write for these parameters, by their names in the files.

    ``revert_weight_conversion``: from version 5 on, transformers renames and fuses tensors while it loads them, and
    takes them apart when it saves. The result is empty if transformers lacks this function, or if the conversion cannot
    be applied to ``parameters`` because it depends on their shapes or values.

    Args:
        model: it may have no weights.
        parameters: of the model, by name.
        stored: the names in the files that the model is of. Some files have a prefix that the model lacks, such as
            ``vision_model`` of CLIP's tower of images, and others of the same class do not.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    try:
        with _loaded_from(model, stored):
            return dict(revert_weight_conversion(model, parameters)) if parameters else {}
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError):
        return {}


@contextlib.contextmanager
def _loaded_from(model: nn.Module, stored: Collection[str]) -> Iterator[None]:
    """Within this context transformers knows which prefixes the names ``stored`` have, as if it had loaded the model
    from their files. It knows already of a model that it has loaded."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:  # an older version has no prefixes
        yield
        return
    if getattr(model, _CONVERSIONS, None) is not None:
        yield
        return
    known = get_model_conversion_mapping(model, add_legacy=False)
    used = [
        conversion
        for conversion in known
        if not isinstance(conversion, PrefixChange)
        or any(conversion.rename_source_key(name)[0] != name for name in stored)
    ]
    setattr(model, _CONVERSIONS, used or None)
    try:
        yield
    finally:
        delattr(model, _CONVERSIONS)


def cache_arguments(output: object) -> dict[str, object]:
    """The argument that passes the cache in a model's output to its next call; empty for an output without a cache."""
    for name in _CACHES:
        cache = getattr(output, name, None)
        if cache is not None:
            return {name: cache}
    return {}
