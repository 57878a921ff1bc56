"""Records of removed structures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CutBlock:
    """A block with fewer neurons or heads. Errors are mean squared errors on held-out tokens, relative to the mean
    square of what the matrix that reads them gave; each token counts relative to the size of the block's output. With
    ``refit=none`` and in published methods no tokens are held out, and in the latter each counts the same."""

    name: str
    error_before: float
    """With the dense weights of the neurons that stay."""
    error: float
    """With the weights that were kept."""
    ridge: float | None
    """The regularisation of the least squares that gave them; None: they are the dense weights."""


@dataclass
class DroppedBlock:
    """A removed block by its name in the dense model, and its influence, ``1 - cos(input, output)`` averaged over
    tokens, when it was removed."""

    name: str
    influence: float


@dataclass
class GoneExperts:
    """The removed experts of a block, by their places in the dense model, and the scores of all its experts."""

    name: str
    experts: list[int]
    scores: list[float]


@dataclass
class TriedRemoval:
    """A removal that was compared with others."""

    part: str
    parameters_after: int
    divergence: float | None = None
    """``KL(dense ‖ smaller)`` of the next token on held-out samples, in nats; None: not measured."""


@dataclass
class Removed:
    """Structures of one kind that were removed, such as neurons."""

    part: str
    """What was asked for, as in ``"neurons=0.2"``."""
    setting: str
    """The setting of ``config.json`` that holds the number; of blocks it may be a list with an entry for each."""
    before: int
    after: int
    multiple: int | None
    """What ``after`` is a multiple of; None for blocks."""
    parameters_before: int
    parameters_after: int
    """Parameters of the whole model; a tied LM head is counted once."""
    seconds: float
    cut: list[CutBlock] = field(default_factory=list)
    """For neurons and heads: each block that has fewer."""
    dropped: list[DroppedBlock] = field(default_factory=list)
    """For blocks: in the order in which they were removed."""
    gone: list[GoneExperts] = field(default_factory=list)
    """For experts: each block that has fewer."""
    tried: list[TriedRemoval] = field(default_factory=list)
    """For ``params`` and ``score=auto``: what was compared, in the first record."""

    @property
    def kind(self) -> str:
        """``"neurons"``, ``"heads"``, ``"experts"`` or ``"blocks"``."""
        return self.part.partition("=")[0]

    @property
    def share(self) -> float:
        """The share of these structures that was removed."""
        return 1 - self.after / self.before

    @property
    def smaller(self) -> float:
        """The share of the model's parameters that was removed."""
        return 1 - self.parameters_after / self.parameters_before

    def summary(self) -> str:
        """One line."""
        number = len(self.cut or self.gone)
        each = self.kind != "blocks"
        of = f" of each of {number} blocks" if number else " of each block" if each else ""
        rounded = "" if self.multiple in (None, 1) else f", in multiples of {self.multiple}"
        end = f", {self.seconds:.1f} s" if self.seconds else ""
        word = "removed" if self.seconds else "removes"
        choice = ""
        if self.tried:
            measured = all(one.divergence is not None for one in self.tried)
            choice = f"nearest of {len(self.tried)}: " if measured else f"the first of {len(self.tried)} candidates: "
        return (
            f"{choice}{word} {self.before - self.after} of {self.before} {self.kind}{of} ({self.share:.1%}{rounded}): "
            f"{self.setting} is {self.after}; {self.smaller:.1%} of the model's parameters{end}"
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Removed":
        """The reverse of ``dataclasses.asdict``, also after JSON."""
        cut = [CutBlock(**block) for block in data["cut"]]
        dropped = [DroppedBlock(**block) for block in data["dropped"]]
        gone = [GoneExperts(**block) for block in data.get("gone", [])]
        tried = [TriedRemoval(**one) for one in data.get("tried", [])]
        return cls(**{**data, "cut": cut, "dropped": dropped, "gone": gone, "tried": tried})
