"""Import paths of version 0.1, when all modules were in one folder: they still work, and warn of the new path."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED: dict[str, tuple[str, ...]] = {
    "allocation": ("pruning.allocation",),
    "bench": ("compare.runner",),
    "calibration": ("data.windows", "data.generate", "fingerprint"),
    "checkpoint": ("models.loading", "models.location", "runs.output"),
    "config": ("pruning.config",),
    "devices": ("engine.devices",),
    "differences": ("fingerprint",),
    "driver": ("engine.api",),
    "estimate": ("runs.memory_model",),
    "evaluate": ("data.perplexity",),
    "experts": ("models.held",),
    "extension": ("ops._extension",),
    "gram": ("pruning.gram",),
    "hidden": ("models.hidden_states",),
    "html_report": ("reporting.run_page", "reporting.compare_page", "reporting.html"),
    "layout": ("models.tensor_map",),
    "loop": ("engine.walk",),
    "masks": ("pruning.masks",),
    "memory": ("process_memory",),
    "methods": ("compare.method_spec",),
    "model_walk": ("models.blocks", "models.replay"),
    "offload": ("models.block_store", "models.skeleton"),
    "options": ("runs.options",),
    "pipeline": ("runs.pipeline",),
    "plan": ("runs.plan",),
    "plots": ("reporting.plots",),
    "presets": ("pruning.presets",),
    "progress": ("engine.progress",),
    "ranks": ("engine.distributed",),
    "reference": ("ops.reference",),
    "report": ("records", "models.versions"),
    "results": ("compare.journal",),
    "scores": ("pruning.criteria", "pruning.kinds"),
    "shards": ("models.safetensors_files",),
    "solvers": ("pruning.solvers", "pruning.prune_linear"),
    "source": ("runs.model_source",),
    "statistics": ("pruning.statistics",),
    "stats_file": ("runs.statistics_file",),
    "study": ("compare.grid", "compare.runner"),
    "tables": ("compare.tables",),
    "texts": ("data.corpora", "data.gensim_data", "data.local_files"),
    "trial": ("runs.dry_run",),
    "tune": ("pruning.block_tuning",),
    "unpacking": ("models.gguf",),
    "verify": ("runs.verify",),
    "workspace": ("runs.workspace", "runs.unfinished", "fingerprint"),
}
"""By the module's name in 0.1: the modules that hold its names now."""


class _OldModule(ModuleType):
    """A module of 0.1: looks its names up in the modules that replaced it."""

    def __getattr__(self, name: str) -> object:
        for new in MOVED[self.__name__.removeprefix("ace_ext.")]:
            module = import_module(f"ace_ext.{new}")
            if not name.startswith("__") and hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _OldPaths(MetaPathFinder, Loader):
    """Finds the modules of :data:`MOVED`. It comes last on ``sys.meta_path`` and so hides no other module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == "ace_ext" and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        now = " and ".join(f"ace_ext.{new}" for new in MOVED[module.__name__.removeprefix("ace_ext.")])
        # Level 2 is the importing line: Python leaves out the frames of the import system.
        warnings.warn(f"{module.__name__} moved: import from {now}", DeprecationWarning, stacklevel=2)


def keep_old_paths() -> None:
    """Lets the import system find modules under their names of 0.1."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
