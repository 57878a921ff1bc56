"""Distillation of a whole pruned model from the dense one, with fixed masks: pruned weights stay zero, the others are
trained. May import ``pruning`` and the layers below it; its only files are those of hidden states.
"""

from ace_ext.healing.distill import distill_
from ace_ext.healing.settings import HealSettings

__all__ = ["HealSettings", "distill_"]
