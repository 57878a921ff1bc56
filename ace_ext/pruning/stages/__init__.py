"""The stages of a method. One file declares one stage: its name, options, memory and code.

Every file of this package defines ``STAGE`` and is registered, except files whose names start with ``_``. To add a
stage, add a file: the parser of methods, ``--help``, the memory estimate and the documentation read the registry.
Stages that work on a matrix lower ``Σ_i e_i G e_iᵀ``, where ``e_i`` is the change of row i and ``G`` the Gram matrix of
the inputs. Those that prune keep exactly as many weights as the target says; of these,
``quantize`` may round some to zero. Pruned weights are +0.0.
"""

from typing import TypeVar

from ace_ext._registry import add, discover
from ace_ext.pruning.stages._stage import (
    BlockSizes,
    MatrixStage,
    Problem,
    Refine,
    Solve,
    Solved,
    Stage,
    TrainBlock,
    TrainModel,
    Units,
    overflow,
)
from ace_ext.pruning.stages.admm import Admm
from ace_ext.pruning.stages.allocate import Allocate
from ace_ext.pruning.stages.collect import Collect
from ace_ext.pruning.stages.distill import Distill
from ace_ext.pruning.stages.mean_swaps import MeanSwaps
from ace_ext.pruning.stages.mean_update import MeanUpdate
from ace_ext.pruning.stages.obs import Obs
from ace_ext.pruning.stages.quantize import Quantize
from ace_ext.pruning.stages.score import Score
from ace_ext.pruning.stages.swaps import Swaps
from ace_ext.pruning.stages.train import Train

Kind = TypeVar("Kind", bound=Stage)

KINDS: tuple[type[Stage], ...] = (Collect, Allocate, Score, Refine, Solve, Quantize, TrainBlock, TrainModel)
"""The kinds of stages in the order in which they run. A method has at most one of each."""

STAGES: dict[str, type[Stage]] = {}
"""Every stage by name. Methods do not contain the name ``score``: a score stage is written as its metric."""


def register(stage: type[Stage]) -> None:
    """Registers a stage that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    add(STAGES, stage, "stage")


def stages_of(kind: type[Kind]) -> dict[str, type[Kind]]:
    """The registered stages of a kind, by name."""
    return {name: stage for name, stage in STAGES.items() if issubclass(stage, kind)}


for _stage in discover(__name__, __path__, "STAGE"):
    register(_stage)

__all__ = [
    "KINDS",
    "STAGES",
    "Admm",
    "Allocate",
    "BlockSizes",
    "Collect",
    "Distill",
    "MatrixStage",
    "MeanSwaps",
    "MeanUpdate",
    "Obs",
    "Problem",
    "Quantize",
    "Refine",
    "Score",
    "Solve",
    "Solved",
    "Stage",
    "Swaps",
    "Train",
    "TrainBlock",
    "TrainModel",
    "Units",
    "overflow",
    "register",
    "stages_of",
]
