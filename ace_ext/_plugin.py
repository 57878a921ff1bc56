"""Tells transformers about packed folders as soon as it is loaded, before or after ``import ace_ext``.

transformers has no entry points for plugins, and ``import ace_ext`` must not load it, which takes seconds. So a finder
waits for the module that keeps the list of quantizers; it does not change how that is found.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"


class _Waiting(MetaPathFinder):
    """Registers once the module has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)  # by the other finders
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    import_module("ace_ext.runtime.quantizer")  # at its end, also if it was what loads transformers' quantizers


def register_when_loaded() -> None:
    """Registers the quantizer of packed folders, now or when transformers loads its quantizers."""
    if _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
