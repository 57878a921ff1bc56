"""Names of the methods of a comparison: metrics, solvers, presets and published methods, and changes to them.

A name like ``ace``, ``balanced`` or ``published-wanda`` stands for keyword arguments of :class:`ace_ext.PruneConfig`;
changes follow a colon, as in ``admm:gram=cosine,damping=0.05``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig, all_settings
from ace_ext.pruning.criteria import METRICS
from ace_ext.pruning.presets import PRESETS, PUBLISHED
from ace_ext.pruning.solvers import all_solvers


def _solver_methods() -> dict[str, dict[str, Any]]:
    """A method for each solver's name; where a mask solver and an update share one, it stands for both."""
    methods: dict[str, dict[str, Any]] = {}
    for solver in all_solvers():
        methods.setdefault(solver.name, {})[solver.stage] = solver.name
    return methods


METHODS: dict[str, dict[str, Any]] = {
    **{name: {"metric": name} for name in METRICS},
    **_solver_methods(),
    **PRESETS,
    **PUBLISHED,
}
"""Keyword arguments of :class:`ace_ext.PruneConfig` by name. A metric's name alone keeps the default order of pruning;
``published-wanda`` is the metric ``wanda`` in the order that its authors use."""

_GIVEN_BY_THE_GRID = ("sparsity", "pattern")
_SEVERAL_DEFAULTS = ("damping",)
"""Options whose default depends on the solver; ``none`` stands for it."""


@dataclass(frozen=True)
class Method:
    """A method of a comparison: the label that tables show, and keyword arguments of :class:`ace_ext.PruneConfig`."""

    label: str
    arguments: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Method":
        """From text like ``"ace"`` or ``"admm:gram=cosine,damping=0.05"``.

        Raises:
            InputError: an unknown name, a field that :class:`ace_ext.PruneConfig` lacks or that the grid gives, a field
                given twice, or a value of the wrong type.
        """
        name, _, changes = text.partition(":")
        known = {**_solver_methods(), **METHODS}
        if name not in known:
            raise InputError(f"method must be one of {', '.join(METHODS)} (got {name!r}); changes follow a colon")
        arguments = dict(known[name])
        given = [_parse_change(text, change) for change in changes.split(",")] if changes else []
        if len(dict(given)) < len(given):
            raise InputError(f"method {text!r} gives a field twice; name each once")
        return cls(text, {**arguments, **dict(given)})

    @property
    def published(self) -> bool:
        """Whether it is a published method with its own settings, changed or not."""
        return self.label.partition(":")[0] in PUBLISHED

    def config(self, **others: Any) -> PruneConfig:
        """The configuration: the method's arguments, and ``others`` (sparsity or pattern, skip …) that it does not set.

        With a pattern, weights compete within its groups, so the method's own ``group`` is ignored.

        Raises:
            InputError: for values that :class:`ace_ext.PruneConfig` refuses; the message names the method.
        """
        unknown = sorted(set(self.arguments) - all_settings().keys())
        if unknown:
            raise InputError(f"method {self.label!r} needs {', '.join(unknown)}, which this PruneConfig does not have")
        try:
            arguments = {**others, **self.arguments}
            if arguments.get("pattern") is not None:
                arguments.pop("group", None)
            return PruneConfig(**arguments)
        except InputError as error:
            raise InputError(f"method {self.label!r}: {error}") from error


def parse_methods(text: str) -> tuple[Method, ...]:
    """A list like ``"wanda,admm:gram=cosine,damping=0.05,ace"``. A part ``key=value`` belongs to the method before it.

    Raises:
        InputError: as :meth:`Method.parse`, for an empty list, and for a method given twice.
    """
    whole: list[str] = []
    for part in text.split(","):
        part = part.strip()
        continues = "=" in part and ":" not in part.partition("=")[0]
        if continues and whole:
            whole[-1] += ("," if ":" in whole[-1] else ":") + part
        elif part:
            whole.append(part)
    if not whole:
        raise InputError(f"methods must name at least one of {', '.join(METHODS)} (got {text!r})")
    if len(set(whole)) < len(whole):
        raise InputError(f"methods must each be given once (got {text!r})")
    return tuple(Method.parse(part) for part in whole)


def setting_names() -> list[str]:
    """The keys that a change may name."""
    return [name for name in all_settings() if name not in _GIVEN_BY_THE_GRID]


def _parse_change(method: str, change: str) -> tuple[str, object]:
    key, equals, value = change.partition("=")
    key = key.strip()
    if not equals or key not in setting_names():
        found = f"got {change!r} in {method!r}"
        raise InputError(f"method changes must be key=value with a key of {', '.join(setting_names())} ({found})")
    return key, _parse_value(method, key, value.strip())


def _parse_value(method: str, key: str, text: str) -> object:
    """By the setting's type: ``none`` where it may be left out, a number where it is one, one element of a tuple, or
    text."""
    setting = all_settings()[key]
    if text.lower() == "none" and (setting.default is None or key in _SEVERAL_DEFAULTS):
        return None
    for kind, word in ((int, "a whole number"), (float, "a number")):
        if kind in setting.types:
            try:
                return kind(text)
            except ValueError as error:
                raise InputError(f"{key} must be {word} (got {text!r} in method {method!r})") from error
    return (text,) if tuple in setting.types else text
