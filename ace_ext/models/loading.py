"""Models in and out: hub names, folders and GGUF files in; a folder for transformers out, whole or not at all."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ace_ext.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class LoadedModel:
    model: nn.Module
    tokenizer: object
    source: str


def load_model(source: str, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Loads a causal language model and its tokenizer.

    Args:
        source: a folder, a ``.gguf`` file, or a hub name like ``org/model``.
        dtype: ``auto`` (what the checkpoint says; bfloat16 for GGUF), float32, float16 or bfloat16.
        device: where to put the weights.

    Raises:
        InputError: nothing there, or nothing that transformers can load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_dtype(dtype)
    name, options = _locate(source)
    wanted = DTYPES.get(dtype, torch.bfloat16 if options else "auto")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars of unpacking, which no setting turns off
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, **options, **_dequantize(options))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {source!r} could not be loaded: {reason[:400]}") from error
    _drop_quantization_marks(model, bool(options))
    return LoadedModel(model.to(device).eval(), tokenizer, source)


def check_dtype(dtype: str) -> None:
    """Raises :class:`InputError` for a name that is none of ``auto`` and :data:`DTYPES`."""
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)} (got {dtype!r})")


def load_tokenizer(folder: Path) -> object:
    """The tokenizer of a model folder.

    Raises:
        InputError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"tokenizer of {str(folder)!r} could not be loaded: {reason[:400]}") from error


def local_folder(source: str) -> Path | None:
    """The folder on this machine that holds a model: itself, or what the hub's cache has of it, fetched if need be.
    None for a ``.gguf`` file.

    Raises:
        InputError: as :func:`load_model`, or the hub does not give it.
    """
    name, options = _locate(source)
    if options:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {source!r} could not be fetched: {reason[:400]}") from error


def _locate(source: str) -> tuple[str, dict]:
    """What to hand to ``from_pretrained``: a folder or hub name, and for a GGUF file its name in the folder."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model {source!r} is no file; check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {source!r} has no config.json; give a folder that save_pretrained wrote")
        return str(path), {}
    if path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.parent.is_dir():
        raise InputError(f"model {source!r} is no folder, no .gguf file and no hub name like org/model; check the path")
    return source, {}


def _dequantize(options: dict) -> dict:
    """Newer transformers keep GGUF weights packed unless asked; older ones always unpack and know no such option."""
    if not options:
        return {}
    with contextlib.suppress(ImportError):
        from transformers import GgufConfig

        return {"quantization_config": GgufConfig(dequantize=True)}
    return {}


def _drop_quantization_marks(model: nn.Module, from_gguf: bool) -> None:
    """An unpacked model is a plain one: left-over marks would make ``save_pretrained`` refuse it."""
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized and not from_gguf:
        method = getattr(model.config.quantization_config, "quant_method", None) or "quantized"
        raise InputError(f"model holds {method} weights; give the unquantized checkpoint, prune it, then quantize")
    if quantized:
        del model.config.quantization_config
    for mark, plain in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, mark):
            setattr(model, mark, plain)
