"""Distillation of a whole pruned model from the dense one, with fixed masks: pruned weights stay zero, the others are
trained. May import ``pruning`` and what lies below it; knows no files but those of hidden states.
"""

from ace_ext.healing.distill import distill_
from ace_ext.healing.settings import HealSettings

__all__ = ["HealSettings", "distill_"]
