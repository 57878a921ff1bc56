"""Distillation of the whole pruned model from the dense one with fixed masks (:mod:`ace_ext.healing`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import TrainModel

TOKENS, LEARNING_RATE = 49152, 1.5e-3
"""The defaults for causal language models; the rate is that of ``ace-prune heal`` too."""
NETWORK_TOKENS, NETWORK_RATE = 491520, 3e-3
"""The defaults for other networks. Those are smaller, and gain more from more steps."""


@dataclass(frozen=True)
class Distill(TrainModel):
    """Trains the whole pruned model to predict like the dense one."""

    name = "distill"
    summary = "trains the whole pruned model to predict like the dense one; masks stay fixed"

    tokens: int | None = option(
        None,
        "tokens to train on, rounded up to whole steps; they are other text of the calibration's source "
        f"(default: {TOKENS}; {NETWORK_TOKENS} for networks that are no causal language models)",
        Limits(at_least=1),
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate, a share of each matrix's root mean square weight; it rises, then falls as a cosine "
        f"(default: {LEARNING_RATE}; {NETWORK_RATE} for networks that are no causal language models)",
        Limits(above=0, words="more than 0"),
    )

    def budget(self, causal: bool) -> tuple[int, float]:
        """The tokens and the learning rate for a causal language model, or for another network."""
        tokens, rate = (TOKENS, LEARNING_RATE) if causal else (NETWORK_TOKENS, NETWORK_RATE)
        return self.tokens or tokens, self.learning_rate or rate


STAGE = Distill
