"""Registries of named entries that are found in the files of a package, such as stages and output formats."""

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str:
        """The name that users type."""


Entry = TypeVar("Entry", bound=Named)


class Registry(Mapping[str, Entry]):
    """Entries by name. The names are known from the start; an entry's file is imported when the entry is read. So a run
    imports only the entries that it uses.

    Args:
        what: the noun for an entry, for messages.
        loaders: by name, a function that returns the entry (:func:`files`).
    """

    def __init__(self, what: str, loaders: Mapping[str, Callable[[], Entry]]) -> None:
        self._what, self._loaders = what, dict(loaders)

    def add(self, entry: Entry) -> None:
        """Adds an entry that is not a file of the package.

        Raises:
            ValueError: the name is taken.
        """
        if entry.name in self._loaders:
            raise ValueError(f"{self._what} {entry.name!r} is registered already; choose another name")
        self._loaders[entry.name] = lambda: entry

    def __getitem__(self, name: str) -> Entry:
        return self._loaders[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def files(package: str, path: Iterable[str], attribute: str) -> dict[str, Callable[[], Any]]:
    """For each file of a package, except files whose names start with ``_``, a function that imports it and returns its
    attribute. The keys are the names of the files in alphabetical order, with ``-`` for ``_``."""

    def loader(module: str) -> Callable[[], Any]:
        return lambda: getattr(import_module(f"{package}.{module}"), attribute)

    names = [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]
    return {name.replace("_", "-"): loader(name) for name in names}
