"""Distillation of the whole pruned model from the dense one with fixed masks (:mod:`ace_ext.healing`)."""

from dataclasses import dataclass

from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.solvers._problem import ModelSolver


@dataclass(frozen=True)
class DistillOptions(Options):
    """Options of ``update="distill"``."""

    distill_passes: int = option(6, "passes over the calibration tokens", Limits(at_least=1), unused=0)
    distill_lr: float = option(
        5e-4,  # not heal's: over six passes, 1.5e-3 gained nothing on Qwen2.5-Coder-0.5B (docs/results.md)
        "learning rate at its peak, a share of each matrix's root mean square weight; it rises, then falls as a cosine",
        Limits(above=0, words="more than 0"),
    )


SOLVER = ModelSolver(
    name="distill",
    summary="trains the whole pruned model to predict like the dense one, alone or after other updates",
    options=DistillOptions,
)
