"""What ``remove`` takes out of a model: neurons of its feed-forward parts, heads of attention, experts, whole blocks.

A text such as ``neurons=0.2(score=variance) + blocks=2`` names the structures. :func:`removal_of` reads it, and ``str``
writes it; each is the inverse of the other.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ace_ext.errors import InputError, suggestion
from ace_ext.pruning.settings import Limits, Options, option, option_texts

SCORES = {
    "cosine": "the change of direction of the block's output without the input",
    "variance": "the variance of the input times ‖W_j‖² (FLAP, arXiv 2312.11983)",
    "obs": "‖W_j‖² / (C⁻¹)_jj with the inputs' second moments C, a few at a time, C⁻¹ downdated",
}
"""The scores by name, with their formulas. ``W_j``: column j of the matrix that reads the neurons or heads; a group of
heads has several columns."""


AUTO = "auto"
"""The score that stands for each of :data:`SCORES`: the model that predicts most like the dense one stays."""


@dataclass(frozen=True)
class Published:
    """How a paper removes neurons or heads: a baseline. Tokens have equal weights, and none are held out."""

    formula: str
    """Its score, and its update of weights."""
    fit: str
    """What is updated where they are read: ``none``, ``bias`` (by what the removed inputs gave in the mean), or
    ``matrix`` (by least squares)."""
    dense: bool = False
    """Whether the inputs are those of the dense model; else of the model that is pruned so far."""


PUBLISHED = {
    "published-flap": Published(
        "the variance of the input times ‖W_j‖²; a bias, if there is one, takes the mean of what goes (FLAP, arXiv "
        "2312.11983)",
        "bias",
        dense=True,
    ),
    "published-osscar": Published(
        "‖W_j‖² / (C⁻¹)_jj with the inputs' second moments C, a few at a time; then least squares (OSSCAR, arXiv "
        "2403.12983)",
        "matrix",
    ),
    "published-wanda-sp": Published("Σ_i |W_ij| times the norm of the input (Wanda-sp, arXiv 2312.11983)", "none"),
}
"""Published methods for neurons and heads, by the name that ``score`` takes."""

BLOCK_SCORES = {
    "influence": "the least change of direction from a block's input to its output, measured again after each",
    "published-shortgpt": "the same, measured once in the dense model (ShortGPT, arXiv 2403.03853)",
}
"""Which blocks go, by the name that ``score`` takes."""

MOST_AT_ONCE = 256
"""The largest multiple that sizes are rounded to by default: formats of llama.cpp store blocks of 256 numbers."""


@dataclass(frozen=True)
class ShareOf(Options):
    """Removes the same number of something from each block.

    Raises:
        InputError: a value is outside its limits.
    """

    name: ClassVar[str]
    share: float
    """The share that goes, between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(
                f"remove: {self.name} must be a share between 0 and 1 (got {str(self.share)[:100]}){_percent(self)}"
            )
        super().__post_init__()

    @property
    def amount(self) -> float:
        """The value behind the name."""
        return self.share

    def kept(self, count: int) -> int:
        """How many of ``count`` stay.

        Raises:
            InputError: none would stay, or none would be removed.
        """
        return self._possible(int((1 - self.share) * count + 0.5 + 1e-9), count)

    def _possible(self, kept: int, count: int, step: str = "") -> int:
        if not 0 < kept < count:
            what = f"no {self.name[:-1]} would {'stay' if kept < count else 'be removed'}"
            raise InputError(
                f"remove: {self.share:g} of {count} {self.name}{step and f' in multiples of {step}'}: {what}; give "
                f"another share{step and ' or multiple'}"
            )
        return kept


@dataclass(frozen=True)
class Experts(ShareOf):
    """Removes experts: those whose outputs, weighted by the router, have the smallest norm on the tokens that are
    routed to them (REAP, arXiv 2510.13999)."""

    name: ClassVar[str] = "experts"


@dataclass(frozen=True)
class Params(ShareOf):
    """Removes a share of the parameters of all blocks: of a few removals of neurons, heads and blocks with about this
    size, the one whose model predicts most like the dense one."""

    name: ClassVar[str] = "params"


@dataclass(frozen=True)
class Units(ShareOf):
    """Removes parts of the input of one matrix, which is then fitted."""

    score: str = option(
        "cosine",
        "which stay: those with the highest score, or a published method; auto: the score whose model predicts most "
        "like the dense one",
        Limits(choices=(*SCORES, AUTO, *PUBLISHED)),
    )
    refit: str = option(
        "matrix",
        "what the matrix that reads them is fitted to by least squares: matrix (what it gave with all of them) or none",
        Limits(choices=("matrix", "none")),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.published is not None and self.refit != "matrix":
            raise InputError(f"remove: score={self.score} says itself what is fitted; leave out refit={self.refit}")

    @property
    def published(self) -> Published | None:
        """The published method; None: a score of :data:`SCORES`."""
        return PUBLISHED.get(self.score)


@dataclass(frozen=True)
class Neurons(Units):
    """Removes neurons from the feed-forward part of every block."""

    name: ClassVar[str] = "neurons"
    multiple: int | None = option(
        None,
        f"the number that stays is a multiple of this; default: the largest power of two up to {MOST_AT_ONCE} of which "
        "the dense number has 16",
        Limits(at_least=1),
    )

    def multiple_of(self, count: int) -> int:
        """What the number that stays of ``count`` neurons is rounded to a multiple of."""
        return self.multiple or max(2**i for i in range(MOST_AT_ONCE.bit_length()) if 2**i * 16 <= max(16, count))

    def kept(self, count: int) -> int:
        """As :meth:`Units.kept`, a multiple of :meth:`multiple_of`."""
        multiple = self.multiple_of(count)
        kept = int((1 - self.share) * count / multiple + 0.5 + 1e-9) * multiple
        return self._possible(kept, count, str(multiple))


@dataclass(frozen=True)
class Heads(Units):
    """Removes heads of attention: whole groups of query heads with the KV head that they share."""

    name: ClassVar[str] = "heads"


@dataclass(frozen=True)
class Blocks(Options):
    """Removes whole blocks.

    Raises:
        InputError: a value is outside its limits.
    """

    name: ClassVar[str] = "blocks"
    amount: float | int
    """A share between 0 and 1, or a whole number of blocks."""
    score: str = option("influence", "which go: those with the least influence", Limits(choices=tuple(BLOCK_SCORES)))

    def __post_init__(self) -> None:
        whole = isinstance(self.amount, int) and self.amount >= 1
        if not whole and not 0 < self.amount < 1:
            raise InputError(
                f"remove: blocks must be a share between 0 and 1 or a whole number of blocks "
                f"(got {str(self.amount)[:100]})"
            )
        super().__post_init__()

    def removed(self, count: int) -> int:
        """How many of ``count`` blocks go.

        Raises:
            InputError: none would go, or none would stay.
        """
        removed = self.amount if isinstance(self.amount, int) else int(self.amount * count + 0.5)
        if not 0 < removed < count:
            raise InputError(
                f"remove: blocks={str(self.amount)[:20]} of {count} blocks: at least one must go and one stay"
            )
        return removed


Part = Experts | Heads | Neurons | Blocks | Params
PARTS: dict[str, type[Part]] = {kind.name: kind for kind in (Blocks, Experts, Heads, Neurons, Params)}
"""The structures by name, in the order in which they are removed."""


@dataclass(frozen=True)
class Removal:
    """The structures to remove, at most one part of each kind."""

    parts: tuple[Part, ...]

    @property
    def units(self) -> list[Heads | Neurons]:
        """The parts for heads and neurons, in the order in which they are removed."""
        return [part for part in self.parts if isinstance(part, Heads | Neurons)]

    @property
    def experts(self) -> Experts | None:
        """The part for experts; None: none are removed."""
        return next((part for part in self.parts if isinstance(part, Experts)), None)

    @property
    def params(self) -> Params | None:
        """The part for a share of the parameters, which stands alone; None: there is none."""
        return next((part for part in self.parts if isinstance(part, Params)), None)

    @property
    def scored(self) -> list["Removal"]:
        """The removals that the score ``auto`` stands for, one for each score; empty without it."""
        if all(part.score != AUTO for part in self.units):
            return []
        return [Removal(tuple(_scored(part, score) for part in self.parts)) for score in SCORES]

    @property
    def takes_neurons(self) -> bool:
        """Whether neurons may go."""
        return any(isinstance(part, Neurons | Params) for part in self.parts)

    @property
    def compares(self) -> bool:
        """Whether several removals are compared, and the best stays."""
        return self.params is not None or bool(self.scored)

    @property
    def blocks(self) -> Blocks | None:
        """The part for blocks; None: none are removed."""
        return next((part for part in self.parts if isinstance(part, Blocks)), None)

    def __str__(self) -> str:
        """The text of the parts; :func:`removal_of` reads it back."""
        return " + ".join(map(text_of, self.parts))


def _scored(part: Part, score: str) -> Part:
    return replace(part, score=score) if isinstance(part, Heads | Neurons) and part.score == AUTO else part


def text_of(part: Part) -> str:
    """The text of one part."""
    options = ", ".join(f"{name}={value}" for name, value in part.changed())
    return f"{part.name}={part.amount}" + (f"({options})" if options else "")


_PART = re.compile(r"(?P<name>[a-z]+)\s*=\s*(?P<amount>[^\s()=]+)\s*(?:\((?P<options>[^()]*)\))?")


def removal_of(given: "Removal | str") -> Removal:
    """The removal that a text stands for.

    Raises:
        InputError: the text is not parts joined by ``+``; a name or option is unknown or given twice; or a value is
            outside its limits.
    """
    if isinstance(given, Removal):
        return given
    if not isinstance(given, str):
        raise InputError(f'remove must be a text such as "neurons=0.2" (got {str(given)[:100]})')
    parts = [_part(text) for text in given.split("+")]
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"remove: {name} is given twice (got {given[:100]!r}); give it once")
    if Params.name in names and len(names) > 1:
        raise InputError(f"remove: params chooses among the other structures (got {given[:100]!r}); give it alone")
    order = list(PARTS)
    return Removal(tuple(sorted(parts, key=lambda part: order.index(part.name))))


def _part(text: str) -> Part:
    match = _PART.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f'remove must be parts joined by +, each name=amount or name=amount(option=value, …), e.g. "neurons=0.2 + '
            f'blocks=2" (got {text[:100]!r})'
        )
    name, known = match["name"], PARTS
    if name not in known:
        raise InputError(f"remove: {name[:100]!r} is not one of {', '.join(known)}{suggestion(name, known)}")
    return known[name](_number(name, match["amount"]), **_options(known[name], match["options"] or ""))


def _number(name: str, text: str) -> float | int:
    for kind in (int, float):
        try:
            return kind(text) if text.isascii() and "_" not in text else kind("x")
        except ValueError:
            continue
    raise InputError(f"remove: {name} must be a number (got {text[:100]!r})")


def _options(kind: type[Part], text: str) -> dict[str, Any]:
    known = {setting.name: setting for setting in kind.settings()}
    given = option_texts(text, text, "remove: options")
    for name in given:
        if name not in known:
            own = f"its options are {', '.join(known)}" if known else "it has none"
            raise InputError(f"remove: {kind.name} has no option {name[:100]}: {own}{suggestion(name, known)}")
    return {name: known[name].parse(value) for name, value in given.items()}


def _percent(part: ShareOf) -> str:
    return f"; did you mean {part.share / 100:g}?" if 1 < part.share < 100 else ""
