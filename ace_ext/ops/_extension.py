"""Loads the compiled module; if that fails, the error says why and what to do."""

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ace_ext._C import BuildInfo

_REBUILD = "rebuild it in this environment: pip install --no-build-isolation --force-reinstall --no-deps ."


def _same_release(built: str, found: str) -> bool:
    """Torch keeps its C++ ABI within a minor release, not across."""
    return built.split("+")[0].split(".")[:2] == found.split("+")[0].split(".")[:2]


def _explain(error: ImportError) -> str:
    text = str(error)
    if "c10_cuda" in text or "torch_cuda" in text or "cudart" in text:
        return f"ace_ext was built for a torch with CUDA, but torch {torch.__version__} has none; {_REBUILD} ({text})"
    if "undefined symbol" in text:
        return f"ace_ext was built for another torch than {torch.__version__}; {_REBUILD} ({text})"
    if "ace_ext._C" in text or "_C" in text:
        return f"the compiled part of ace_ext is not here; {_REBUILD} ({text})"
    return f"the compiled part of ace_ext could not be loaded: {text}"


@cache
def compiled() -> ModuleType:
    """The module ``ace_ext._C``, loaded once; loading it registers the ops with torch.

    Raises:
        ImportError: it is not there, or built for another torch; the message says how to rebuild it.
    """
    try:
        from ace_ext import _C
    except ImportError as error:
        raise ImportError(_explain(error)) from error
    built = _C.build_info()["torch"]
    if not _same_release(built, torch.__version__):
        raise ImportError(f"ace_ext was built for torch {built}, but this is torch {torch.__version__}; {_REBUILD}")
    return _C


def build_info() -> "BuildInfo":
    """What the extension was built for: ``version``, ``torch``, ``cuda`` (or None), ``compiler``, ``cplusplus``."""
    info: BuildInfo = compiled().build_info()
    return info


def registered() -> Any:
    """The ops as torch knows them, ``torch.ops.ace_ext``; loading the compiled module registers them."""
    compiled()
    return torch.ops.ace_ext
