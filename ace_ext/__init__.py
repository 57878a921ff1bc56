"""ace_ext: one-shot pruning of Hugging Face causal language models.

>>> from ace_ext import preset_config, prune_model
>>> report = prune_model(model, tokens, preset_config("fast", sparsity=0.5))
"""

# ruff: noqa: E402
from ace_ext.process_threads import wait_passively

wait_passively()  # before the imports that load torch

from ace_ext._moved import keep_old_paths
from ace_ext.engine.api import prune_model
from ace_ext.errors import InputError
from ace_ext.ops._extension import build_info
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.pattern import SparsityPattern
from ace_ext.pruning.presets import preset_config
from ace_ext.pruning.solver_config import SolverConfig
from ace_ext.records import PruneReport
from ace_ext.version import __version__

__all__ = [
    "InputError",
    "PruneConfig",
    "PruneReport",
    "SolverConfig",
    "SparsityPattern",
    "__version__",
    "build_info",
    "preset_config",
    "prune_model",
]

keep_old_paths()
