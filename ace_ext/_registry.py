"""Registries of named entries that are found in the files of a package, such as stages and output formats."""

import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """An entry of a registry."""

    @property
    def name(self) -> str:
        """The name that users type."""


Entry = TypeVar("Entry", bound=Named)


def add(registry: dict[str, Entry], entry: Entry, what: str) -> None:
    """Adds an entry under its name. ``what``: the noun for an entry, for the message.

    Raises:
        ValueError: the name is taken.
    """
    if entry.name in registry:
        raise ValueError(f"{what} {entry.name!r} is registered already; choose another name")
    registry[entry.name] = entry


def discover(package: str, path: Iterable[str], attribute: str) -> Iterator[Any]:
    """The attribute of each file of a package, in alphabetical order, except files whose names start with ``_``."""
    for module in pkgutil.iter_modules(path):
        if not module.name.startswith("_"):
            yield getattr(import_module(f"{package}.{module.name}"), attribute)
