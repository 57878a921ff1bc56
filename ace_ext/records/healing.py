"""What a distillation did, and perplexity before and after a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ace_ext.errors import counted

KL = "KL"
"""The loss of a model with a vocabulary: ``KL(dense ‖ pruned)``, the Kullback-Leibler divergence of the distributions
of the next token, in nats."""
STATES = "difference of hidden states"
"""The loss of a network without a vocabulary (:class:`ace_ext.healing.networks.Loss`)."""


@dataclass
class Healing:
    """What a distillation did. Losses are means over tokens."""

    settings: dict[str, Any]
    """The fields of :class:`ace_ext.healing.HealSettings`; ``learning_rate`` is the one that was taken."""
    tokens: int
    """Tokens trained on, counted once per pass."""
    steps: int
    parts: int
    """How many windows the blocks were divided into. Windows are trained one after another; 1: all blocks together."""
    held_out: int
    """Tokens that were only used for measurements."""
    loss_before: float
    """On the held-out tokens."""
    loss_after: float
    """On the same tokens, with the best weights that were measured. The run keeps these, so this is never above
    ``loss_before``."""
    zeros: int
    """How many weights are pruned. All were checked to be zero before and after."""
    seconds: float
    losses: list[tuple[int, float | None]] = field(default_factory=list)
    """The loss over time: pairs of a step's number and the mean loss of the steps since the pair before. The loss of a
    step is on its own tokens. None: not finite."""
    checks: list[tuple[int, float | None]] = field(default_factory=list)
    """Pairs of a number of steps and the loss on the held-out tokens after them. None: not finite."""
    backed_off: list[int] = field(default_factory=list)
    """The steps after which the held-out loss was far above that of the start
    (:data:`ace_ext.healing.part.MUCH_WORSE`), or above it for the second time in a row without falling. Training then
    returned to the best weights and continued with a lower learning rate (:data:`ace_ext.healing.part.BACK_OFF`)."""
    loss_of: str = KL
    """What the loss is: :data:`KL` or :data:`STATES`."""

    def summary(self) -> str:
        """One line."""
        rate, steps = self.settings["learning_rate"], ", ".join(map(str, self.backed_off))
        end = f"; the learning rate {rate:.2g} was too high: lowered after step {steps}" if steps else ""
        if not self.loss_after < self.loss_before:
            end += "; no gain, try a lower learning rate"
        return (
            f"distilled on {self.tokens:,} tokens in {self.steps} steps, {self.seconds:.1f} s: {self.loss_of} on "
            f"{self.held_out:,} held-out tokens {self.loss_before:.4f} before, {self.loss_after:.4f} after{end}"
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Healing":
        """The reverse of ``dataclasses.asdict``, also after JSON."""

        def pairs(name: str) -> list[tuple[int, float | None]]:
            return [(int(step), None if loss is None else float(loss)) for step, loss in data[name]]

        return cls(**{**data, "losses": pairs("losses"), "checks": pairs("checks")})


@dataclass
class HeldOutPerplexity:
    """Perplexity on a few windows of held-out text: a rough check, not a result to cite. None: not finite."""

    text: str
    windows: int
    seqlen: int
    """Tokens of a window; the first is not predicted."""
    dense: float | None
    pruned: float | None
    healed: float | None = None
    """After a distillation that belongs to the run; None also without one."""

    @property
    def ratio(self) -> float | None:
        """The last figure relative to the dense model's; infinity if it is not finite, None if the dense one is not."""
        after = self.pruned if self.healed is None else self.healed
        if not self.dense:
            return None
        return math.inf if after is None else after / self.dense

    def summary(self) -> str:
        """One line."""
        figures = [f"{figure_text(self.dense)} dense", f"{figure_text(self.pruned)} pruned"]
        if self.healed is not None:
            figures.append(f"{figure_text(self.healed)} distilled")
        place = f"{counted(self.windows, 'window')} of {self.seqlen} tokens of {self.text}"
        return f"perplexity {', '.join(figures)} ({place})"


def finite(value: float) -> float | None:
    """``value``, or None if JSON has no number for it."""
    return value if math.isfinite(value) else None


def figure_text(value: float | None) -> str:
    """A perplexity as text."""
    return "not finite" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
