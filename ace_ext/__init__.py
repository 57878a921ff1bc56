"""ace_ext: one-shot pruning of Hugging Face causal language models.

>>> from ace_ext import PruneConfig, prune_model
>>> report = prune_model(model, tokens, PruneConfig(metric="ace", sparsity=0.5))
"""

from .config import PruneConfig, SparsityPattern
from .driver import prune_model
from .errors import InputError
from .extension import build_info
from .report import PruneReport
from .version import __version__

__all__ = ["InputError", "PruneConfig", "PruneReport", "SparsityPattern", "__version__", "build_info", "prune_model"]
