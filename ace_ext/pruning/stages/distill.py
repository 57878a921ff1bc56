"""Distillation of the whole pruned model from the dense one with fixed masks (:mod:`ace_ext.healing`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages._stage import TrainModel

LEARNING_RATE = 1.5e-3
"""The default, also of ``ace-prune heal``."""


@dataclass(frozen=True)
class Distill(TrainModel):
    """Trains the whole pruned model to predict like the dense one."""

    name = "distill"
    summary = "trains the whole pruned model to predict like the dense one; masks stay fixed"

    tokens: int = option(
        49152,
        "tokens to train on, rounded up to whole steps; they are other text of the calibration's source",
        Limits(at_least=1),
    )
    learning_rate: float = option(
        LEARNING_RATE,
        "peak learning rate, a share of each matrix's root mean square weight; it rises, then falls as a cosine",
        Limits(above=0, words="more than 0"),
    )


STAGE = Distill
