"""Distillation of the whole pruned model from the dense one with fixed masks (:mod:`ace_ext.healing`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import TrainModel

TOKENS, RATE, HIGHEST_RATE = 49152, 1.1e-3, 2e-3
"""The defaults for causal language models. The rate, also of ``ace-prune heal``, is ``RATE`` times the root of the
held-out divergence at the start, in nats, and at most the highest. A divergence grows as the square of a distance, so
the steps are in proportion to the distance from the dense model. The best rates that were found differ by four times
(docs/heal.md); this is close to each."""
NETWORK_TOKENS, NETWORK_RATE = 491520, 3e-3
"""The defaults for other networks. Those are smaller, and gain more from more steps."""
RATE_HELP = (
    f"(default: {RATE} times the root of the pruned model's divergence in nats, at most {HIGHEST_RATE}; {NETWORK_RATE} "
    "for networks that are no causal language models)"
)


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
        + RATE_HELP,
        Limits(above=0, words="more than 0"),
    )

    def budget(self, causal: bool) -> int:
        """The tokens for a causal language model, or for another network."""
        return self.tokens or (TOKENS if causal else NETWORK_TOKENS)


STAGE = Distill
