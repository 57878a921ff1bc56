"""ace_ext: one-shot pruning of Hugging Face models.

>>> from ace_ext import prune_model
>>> report = prune_model(model, tokens, method="balanced", sparsity=0.5)
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ace_ext.errors import InputError
from ace_ext.version import __version__

if os.name != "posix":
    raise ImportError("ace_ext runs on Linux and macOS only: it locks files and reads limits as only these systems do")

if TYPE_CHECKING:
    from ace_ext.engine.api import prune_model
    from ace_ext.ops._extension import build_info
    from ace_ext.pruning.config import PruneConfig
    from ace_ext.pruning.groups import SparsityPattern
    from ace_ext.records import PruneReport
    from ace_ext.runtime.loading import load_packed
    from ace_ext.runtime.quantizer import register

__all__ = [
    "InputError",
    "PruneConfig",
    "PruneReport",
    "SparsityPattern",
    "__version__",
    "build_info",
    "load_packed",
    "prune_model",
    "register",
]

_HOMES = {
    "PruneConfig": "pruning.config",
    "PruneReport": "records",
    "SparsityPattern": "pruning.groups",
    "build_info": "ops._extension",
    "load_packed": "runtime.loading",
    "prune_model": "engine.api",
    "register": "runtime.quantizer",
}
"""The modules of the public names. A module is loaded when one of its names is first used: torch takes seconds to load,
and the command line must be able to report an interruption meanwhile."""


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"ace_ext.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"ace_ext.{name}") is not None:
        return import_module(f"ace_ext.{name}")
    raise AttributeError(f"module 'ace_ext' has no attribute {name!r}")
