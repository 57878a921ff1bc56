"""ace_ext: one-shot pruning of Hugging Face causal language models.

>>> from ace_ext import preset_config, prune_model
>>> report = prune_model(model, tokens, preset_config("fast", sparsity=0.5))
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ace_ext._moved import keep_old_paths
from ace_ext._plugin import register_when_loaded
from ace_ext.errors import InputError
from ace_ext.process_threads import wait_passively
from ace_ext.version import __version__

if os.name != "posix":
    raise ImportError("ace_ext runs on Linux and macOS only: it locks files and reads limits as only these systems do")

if TYPE_CHECKING:
    from ace_ext.engine.api import prune_model
    from ace_ext.ops._extension import build_info
    from ace_ext.pruning.config import PruneConfig
    from ace_ext.pruning.pattern import SparsityPattern
    from ace_ext.pruning.presets import preset_config
    from ace_ext.pruning.solver_config import SolverConfig
    from ace_ext.records import PruneReport
    from ace_ext.runtime.loading import load_packed

__all__ = [
    "InputError",
    "PruneConfig",
    "PruneReport",
    "SolverConfig",
    "SparsityPattern",
    "__version__",
    "build_info",
    "load_packed",
    "preset_config",
    "prune_model",
]

_HOMES = {
    "PruneConfig": "pruning.config",
    "PruneReport": "records",
    "SolverConfig": "pruning.solver_config",
    "SparsityPattern": "pruning.pattern",
    "build_info": "ops._extension",
    "load_packed": "runtime.loading",
    "preset_config": "pruning.presets",
    "prune_model": "engine.api",
}
"""The modules of the public names. They are loaded when a name is used first: torch takes seconds, in which the command
line must be able to say that it was interrupted."""


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"ace_ext.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"ace_ext.{name}") is not None:
        return import_module(f"ace_ext.{name}")
    raise AttributeError(f"module 'ace_ext' has no attribute {name!r}")


wait_passively()  # before torch is loaded, which no import above does
keep_old_paths()
register_when_loaded()
