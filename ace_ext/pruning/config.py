"""What to prune and how: the target and the method. Both are checked when a configuration is made, before a model
changes."""

import inspect
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ace_ext.errors import InputError, suggestion
from ace_ext.pruning.groups import GROUPS, ComparisonGroup, PatternGroup, SparsityPattern
from ace_ext.pruning.method import DEFAULT, Method, Needs, method_of, option_hint
from ace_ext.pruning.removal import Removal, removal_of
from ace_ext.pruning.settings import check_choice
from ace_ext.pruning.stages import Score, Stage, TrainModel
from ace_ext.pruning.stages.collect import BLOCK, EXACT, SEQUENTIAL, SKETCH

SPARSITY = 0.5
"""The default share of zeros."""
MAX_DENSE = 0.1
"""The default of ``max_dense``."""


class PruneConfig:
    """What :func:`ace_ext.prune_model` prunes, and with which method. Do not change it once it is made.

    Args:
        method: a text such as ``"balanced"`` or ``"admm(iterations=30) + distill"``, a stage, or a list of stages
            (:mod:`ace_ext.pruning.method`). None: the preset ``fast``.
        sparsity: share of zeros in ``[0, 1]``; default 0.5, and 0 for a method that only quantizes. Not together with
            ``pattern``.
        pattern: N:M, as a :class:`SparsityPattern` or text like ``"2:4"``; N are kept.
        group: the comparison group: the weights of one ``"row"``, one ``"matrix"`` or the whole ``"model"`` are ranked
            against each other. ``"model"`` needs all scores at once, so all statistics are those of the dense model.
            Default: ``"row"``, or ``"matrix"`` if ``obs``, ``alps`` or ``thanos`` choose the mask. Not together with
            ``pattern``, which has its own groups.
        skip: regular expressions, or a single one. A Linear or expert weight stays dense if its full name matches one.
        towers: regular expressions, or a single one, of names of lists of blocks: only these are pruned, also those of
            a vision or audio tower that stays dense by default. Not together with ``remove`` or ``distill``.
        max_dense: the share of a block's weights that may stay dense because no known matrix product reads them, such
            as convolutions and decays. The report lists them. A larger share is an error.
        remove: whole structures to remove first, as text such as ``"neurons=0.2"`` (:mod:`ace_ext.pruning.removal`).
            Zeros follow only if ``sparsity`` or ``pattern`` is given, and quantization if ``method`` only quantizes.

    Raises:
        InputError: a value is outside its limits, or arguments exclude each other.
    """

    def __init__(
        self,
        method: str | Stage | Sequence[Stage] | Method | None = None,
        sparsity: float | None = None,
        pattern: SparsityPattern | str | None = None,
        group: str | None = None,
        *,
        skip: str | Iterable[str] | None = (),
        towers: str | Iterable[str] | None = (),
        max_dense: float = MAX_DENSE,
        remove: Removal | str | None = None,
    ) -> None:
        self.method: Method = method_of(DEFAULT if method is None else method)
        self.pattern = _pattern(pattern)
        self.remove = None if remove is None else removal_of(remove)
        self.only_removes = self.remove is not None and method is None and sparsity is None and pattern is None
        """Whether the run ends when structures are removed: no weight is set to zero or rounded."""
        if self.remove is not None:
            without_target = sparsity is None and pattern is None and not self.only_removes
            if without_target and self.method.only_distills:
                self.method = self.method.without(Score)  # nothing sets weights to zero
            _check_removal(self.method, without_target)
        if not self.method.prunes:
            _check_nothing_pruned(self.method, sparsity, self.pattern, group)
            sparsity = 0.0
        self.sparsity = _sparsity(sparsity, self.pattern)
        self.group = self._group(group)
        self.skip = patterns_of("skip", skip)
        self.towers = patterns_of("towers", towers)
        self._check_towers()
        self.max_dense = _share("max_dense", max_dense)
        if self.only_removes:
            _check_only_removal(group, self.skip, self.max_dense)
            self.sparsity = 0.0
        self._check_group()
        self._check_allocation()

    def _group(self, given: str | None) -> str:
        if given is None:
            chooses = self.method.solve if self.method.score is None and self.pattern is None else None
            return "row" if chooses is None else chooses.groups[0]
        check_choice("group", given, [*GROUPS])
        if self.pattern is not None and given != "row":
            raise InputError(
                f"group does not go with a pattern, which has its own groups (got {given!r}); leave out group"
            )
        return given

    def _check_towers(self) -> None:
        for name, given in {"remove": self.remove, "distill": self.method.distill}.items():
            if self.towers and given is not None:
                raise InputError(f"towers does not go with {name}; leave out one of them")

    def _check_group(self) -> None:
        """Raises :class:`InputError` if a stage does not support the comparison group."""
        for stage in self.method.matrix_stages:
            if self.group not in stage.groups:
                raise InputError(
                    f"{stage.label} compares within a {' or a '.join(sorted(stage.groups, reverse=True))} (got group "
                    f"{self.group!r}); use group {stage.groups[0]}"
                )
        if not GROUPS[self.group].over_matrices:
            return
        if self.method.train is not None:
            raise InputError(
                f"{self.method.train.label} trains block after block, but group {self.group} prunes all at once; use "
                "group row"
            )
        if self.method.collect.order == SEQUENTIAL:
            raise InputError(f"group {self.group} compares all scores at once; leave out order=sequential")

    def _check_allocation(self) -> None:
        if self.method.allocate is None:
            return
        if self.pattern is not None:
            raise InputError("allocate cannot move weights between N:M groups; leave out pattern or allocate")
        if self.comparison.over_matrices:
            raise InputError(
                f"group {self.group} already divides the sparsity among blocks; leave out allocate, or use group row"
            )

    @property
    def dense_limit(self) -> float:
        """The share of a block's weights that may stay dense unasked: all, if no weight is set to zero or rounded."""
        return 1.0 if self.ends_smaller else self.max_dense

    @property
    def ends_smaller(self) -> bool:
        """Whether structures go and no weight is set to zero or rounded, with a distillation or without."""
        return self.remove is not None and self.without_distillation().only_removes

    @property
    def comparison(self) -> ComparisonGroup:
        """The comparison group: the pattern's own, or the one that ``group`` names."""
        return GROUPS[self.group] if self.pattern is None else PatternGroup(self.pattern)

    @property
    def order(self) -> str:
        """``"block"`` or ``"sequential"``: the option of ``collect``, or else what the group needs."""
        return self.method.collect.order or (BLOCK if self.comparison.over_matrices else SEQUENTIAL)

    @property
    def token_norm(self) -> str:
        """``"exact"`` or ``"sketch"``: the option of ``collect``, or else what is cheap in this order."""
        return self.method.collect.token_norm or (SKETCH if self.order == SEQUENTIAL else EXACT)

    @property
    def needs(self) -> Needs:
        """The kinds of statistics that pruning, allocation and a statistics file need."""
        return Needs.of(self.method)

    def batch_samples(self, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens pass a block at a time."""
        return max(1, self.method.collect.batch_tokens // max(1, seqlen))

    def changed(self, **arguments: Any) -> "PruneConfig":
        """The configuration with these arguments changed."""
        own: dict[str, Any] = {"skip": self.skip, "towers": self.towers, "max_dense": self.max_dense}
        own["remove"] = self.remove
        if not self.only_removes:
            amount = {"pattern": self.pattern} if self.pattern else {"sparsity": self.sparsity, "group": self.group}
            own |= {"method": self.method, **amount}
        return PruneConfig(**{**own, **arguments})

    def without_removal(self) -> "PruneConfig":
        """The configuration for the smaller model: zeros and quantization, as far as they are asked for."""
        return self.changed(remove=None, sparsity=0.0) if self.only_removes else self.changed(remove=None)

    def without_distillation(self) -> "PruneConfig":
        """The configuration without the stage ``distill``."""
        if self.method.distill is None:
            return self
        method = self.method.without(TrainModel)
        return self.changed(method=method) if method.stages else PruneConfig(remove=self.remove)

    def on_dense_blocks(self) -> "PruneConfig":
        """The configuration with statistics of dense blocks, which a statistics file holds.

        Raises:
            InputError: the method has ``order=sequential``.
        """
        if self.method.collect.order == SEQUENTIAL:
            raise InputError("saved statistics are of dense blocks; leave out order=sequential, or write order=block")
        if self.remove is not None:
            return self  # a run that removes structures does not read or write such a file
        return self if self.order == BLOCK else self.changed(method=self.method.collected(order=BLOCK))

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "PruneConfig":
        """The configuration with these arguments by name.

        Raises:
            TypeError: there is no such argument.
            InputError: as :class:`PruneConfig`.
        """
        known = list(inspect.signature(cls).parameters)
        for name in arguments:
            if name not in known:
                raise TypeError(f"there is no argument {name}{option_hint(name) or suggestion(name, known)}")
        return cls(**arguments)

    def from_statistics(self) -> "PruneConfig":
        """The configuration of a run from a statistics file, which has collected already.

        Raises:
            InputError: the method has an option that says how to collect.
        """
        given = [name for name, _ in self.method.collect.changed() if name != "order"]
        if given:
            raise InputError(
                f"{' and '.join(given)} says how statistics are collected, and those of the file are; leave it out"
            )
        return self.on_dense_blocks()

    def to_dict(self) -> dict[str, Any]:
        """All arguments as plain values, for a report. ``method`` is the text of the stages. ``preset`` is the name of
        the preset or published method, None if it is neither or an option is changed. ``remove`` and ``towers`` are
        there only if they are given; ``method`` is then empty if nothing else is done."""
        return {
            **({} if self.remove is None else {"remove": str(self.remove)}),
            "method": "" if self.only_removes else str(self.method),
            "preset": None if self.only_removes else self.method.preset,
            "sparsity": self.sparsity,
            "pattern": str(self.pattern) if self.pattern else None,
            "group": self.group,
            "skip": list(self.skip),
            "max_dense": self.max_dense,
            **({"towers": list(self.towers)} if self.towers else {}),
        }


def _check_removal(method: Method, without_target: bool) -> None:
    """Raises :class:`InputError` for a method that does not go with ``remove``. ``without_target``: there is neither a
    sparsity nor a pattern."""
    if without_target and method.prunes:
        raise InputError(
            f"remove with a method that writes zeros needs their share too (got {method.label}): give sparsity or "
            "pattern, or leave out method"
        )


def _check_only_removal(group: str | None, skip: tuple[str, ...], max_dense: float) -> None:
    """Raises :class:`InputError` for arguments that only zeros read."""
    found = {"group": group, "skip (--exclude)": skip, "max_dense": max_dense != MAX_DENSE}
    for shown, given in found.items():
        if given:
            raise InputError(
                f"{shown} is for zeros, and remove alone writes none; leave it out, or give sparsity or pattern"
            )


def _pattern(given: object) -> SparsityPattern | None:
    if isinstance(given, str):
        return SparsityPattern.parse(given)
    if not isinstance(given, SparsityPattern | None):
        raise InputError(f'pattern must be N:M, N weights kept of M (got {str(given)[:100]}); e.g. "2:4"')
    return given


def _sparsity(given: object, pattern: SparsityPattern | None) -> float:
    if pattern is not None:
        if given is not None and given != pattern.sparsity:
            raise InputError(f"give sparsity or pattern, not both (got {given} and {pattern})")
        return pattern.sparsity
    return _share("sparsity", SPARSITY if given is None else given)


def _check_nothing_pruned(method: Method, sparsity: object, pattern: object, group: object) -> None:
    """Raises :class:`InputError` for a target of a method that prunes nothing; a sparsity of 0 is true of it."""
    given = {"sparsity": sparsity if sparsity != 0 else None, "pattern": pattern, "group": group != "row" and group}
    for name, value in given.items():
        if value:
            raise InputError(
                f"{name} is for methods that prune, and {method} only quantizes (got {str(value)[:100]}); leave out "
                f"{name}, or add a stage that prunes, as in balanced + {method.quantize}"
            )


def _share(name: str, given: object) -> float:
    """``given`` as a share from 0 to 1."""
    number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if number and 0 <= given <= 1:  # type: ignore[operator]  # it is a number
        return float(given)  # type: ignore[arg-type]  # JSON cannot hold numpy's float32
    percent = number and 1 < given <= 100  # type: ignore[operator]
    hint = f"; did you mean {given / 100:g}?" if percent else ""  # type: ignore[operator]
    found = repr(given) if isinstance(given, str) else str(given)
    raise InputError(f"{name} must be a share from 0 to 1 (got {found[:100]}){hint}")


def patterns_of(name: str, given: object) -> tuple[str, ...]:
    """``given`` as a tuple: a single expression stands for a list of one, None for an empty list."""
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    if not isinstance(given, Iterable):
        raise InputError(f"{name} must be regular expressions (got {str(given)[:100]})")
    return tuple(given)
