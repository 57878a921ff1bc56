"""The settings of a distillation, with their limits and help texts."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.stages.distill import RATE_HELP

WARM_UP = 0.05
"""The share of the steps in which the learning rate rises."""
BETAS = (0.9, 0.95)
"""Adam's betas. There may be only a few dozen steps; the default of 0.999 would average over more."""


@dataclass(frozen=True)
class HealSettings(Options):
    """How a pruned model is distilled.

    Raises:
        InputError: a value is outside its limits.
    """

    learning_rate: float | None = option(
        None,
        "Adam's, at its peak, as a share of each matrix's root mean square weight; it rises for a twentieth of the "
        "steps and falls as a cosine " + RATE_HELP,
        Limits(above=0),
    )
    step_tokens: int = option(1024, "tokens of a gradient step, at least one window", Limits(at_least=1))
    passes: int = option(1, "how often each window of text is trained on", Limits(at_least=1))
    held_out: int = option(8, "windows that are only measured on, at most a quarter of all", Limits(at_least=1))
    seed: int = option(0, "seed of the order of the steps", Limits(at_least=0))
