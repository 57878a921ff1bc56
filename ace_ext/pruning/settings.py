"""Options as data. Each is declared once, with a name, a default, limits and a line of help.

The parser of methods, ``--help``, the reports and the documentation read these declarations.
"""

import functools
import math
import re
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from ace_ext.errors import InputError, suggestion


@dataclass(frozen=True)
class Limits:
    """The values that an option accepts. Numbers must be finite, and whole if the option's type is ``int``."""

    choices: Collection[str] | Collection[int] = ()
    """The accepted values. This may be a registry: entries that are added later are then accepted too."""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    words: str = ""
    """The allowed values in words, for the error message; made from the limits if empty."""


_TOO_LARGE = 2**63
"""Every number must be smaller: ops take 64-bit integers."""


def option(default: Any, help: str, limits: Limits | None = None) -> Any:
    """Declares a dataclass field as an option: its default, its line of help, and the values that it accepts (None:
    every value of its type)."""
    return field(default=default, metadata={"help": help, "limits": limits or Limits()})


@dataclass(frozen=True)
class Setting:
    """One declared option."""

    name: str
    types: frozenset[type]
    default: object
    help: str
    limits: Limits

    @property
    def choices(self) -> Collection[str] | Collection[int]:
        """The accepted values; empty for a number within limits or free text."""
        return self.limits.choices

    def check(self, value: object) -> None:
        """Raises :class:`InputError` for a value outside the limits. None is accepted if the type allows it."""
        if value is None and type(None) in self.types:
            return
        if self.choices:
            check_choice(self.name, str(value) if isinstance(value, bool | float) else value, self.choices)
        elif int in self.types or float in self.types:
            self._check_number(value)

    def parse(self, text: str) -> object:
        """The value that a text stands for: a number if the option is one, else the text itself.

        Raises:
            InputError: the text is not a number of the right type. Limits are not checked.
        """
        for kind, words in ((int, "a whole number"), (float, "a number")):
            if kind in self.types:
                try:
                    return kind(text)
                except ValueError as error:
                    raise InputError(f"{self.name} must be {words} (got {text!r})") from error
        return text

    def _check_number(self, value: object) -> None:
        limits = self.limits
        whole = int in self.types
        good = isinstance(value, int | (int if whole else float)) and not isinstance(value, bool)
        if good and _TOO_LARGE <= abs(typing.cast(float, value)) < math.inf:  # exact for whole numbers
            raise InputError(f"{self.name} must be below 2^63 (got {str(value)[:100]})")
        good = good and abs(typing.cast(float, value)) < _TOO_LARGE  # False for NaN
        if good:
            number = typing.cast(float, value)
            good = limits.at_least is None or number >= limits.at_least
            good = good and (limits.above is None or number > limits.above)
            good = good and (limits.below is None or number < limits.below)
            good = good and (limits.multiple_of is None or number % limits.multiple_of == 0)
        if not good:
            raise InputError(f"{self.name} must be {self._allowed(whole)} (got {str(value)[:100]})")

    def _allowed(self, whole: bool) -> str:
        if self.limits.words:
            return self.limits.words
        if self.limits.multiple_of is not None:
            return f"a multiple of {self.limits.multiple_of}"
        if whole:
            return f"a whole number of at least {self.limits.at_least}"
        return f"more than {self.limits.above}" if self.limits.above is not None else "a finite number"


def check_choice(name: str, value: object, choices: Collection[str | int | None]) -> None:
    """Raises :class:`InputError` unless the value is one of the choices."""
    if value not in choices:
        raise InputError(
            f"{name} must be one of {', '.join(map(str, choices))} (got {value!r}){suggestion(value, choices)}"
        )


_OPTION = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<value>[^,=\s]+)\s*")


def option_texts(text: str, whole: str, subject: str) -> dict[str, str]:
    """The values of options such as ``"damping=1, iterations=10"`` by name, as texts.

    Args:
        text: the options; may be empty.
        whole: the text that they stand in, for messages.
        subject: the beginning of the message, such as ``"options of a stage"``.

    Raises:
        InputError: the text is not names with values, separated by commas, or a name is given twice.
    """
    found: dict[str, str] = {}
    for item in text.split(",") if text.strip() else []:
        match = _OPTION.fullmatch(item)
        if match is None:
            raise InputError(f"{subject} must be name=value, separated by commas (got {whole[:100]!r})")
        if match["name"] in found:
            raise InputError(f"option {match['name']} is given twice in {whole[:100]!r}; give it once")
        found[match["name"]] = match["value"]
    return found


def _plain_types(hint: object) -> set[type]:
    """The classes that a type hint allows: ``{int, NoneType}`` for ``int | None``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return {kind for part in typing.get_args(hint) for kind in _plain_types(part)}
    return {typing.cast(type, typing.get_origin(hint) or hint)}


@functools.cache
def _declared_by(options: type) -> tuple[Setting, ...]:
    hints = typing.get_type_hints(options)
    return tuple(
        Setting(item.name, frozenset(_plain_types(hints[item.name])), item.default, **item.metadata)
        for item in fields(options)
        if "help" in item.metadata
    )


@dataclass(frozen=True)
class Options:
    """Base class of a frozen dataclass whose fields are declared with :func:`option`.

    Raises:
        InputError: naming the first option whose value is outside its limits.
    """

    def __post_init__(self) -> None:
        for setting in self.settings():
            setting.check(getattr(self, setting.name))

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """The options that this class declares, in order of declaration."""
        return _declared_by(cls)  # type: ignore[arg-type]  # mypy: a class has no hash

    def changed(self) -> Iterator[tuple[str, object]]:
        """Options that differ from their defaults, by name."""
        for setting in self.settings():
            value = getattr(self, setting.name)
            if value != setting.default:
                yield setting.name, value
