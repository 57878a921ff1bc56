"""The stages of a method. One file declares one stage: its name, options, memory and code.

Every file of this package defines ``STAGE`` and is registered, except files whose names start with ``_``. To add a
stage, add a file: the parser of methods, ``--help``, the memory estimate and the documentation read the registry.
Stages that work on a matrix lower ``Σ_i e_i G e_iᵀ``, where ``e_i`` is the change of row i and ``G`` the Gram matrix of
the inputs. Those that prune keep exactly as many weights as the target says; of these,
``quantize`` may round some to zero. Pruned weights are +0.0.
"""

from typing import TYPE_CHECKING, TypeVar

from ace_ext._registry import Registry, files
from ace_ext.pruning.stages._stage import (
    BlockSizes,
    Divide,
    MatrixStage,
    Problem,
    Refine,
    Round,
    Solve,
    Solved,
    Stage,
    TrainBlock,
    TrainModel,
    Units,
    overflow,
)
from ace_ext.pruning.stages.collect import Collect
from ace_ext.pruning.stages.score import Score

if TYPE_CHECKING:
    from ace_ext.pruning.stages.admm import Admm
    from ace_ext.pruning.stages.allocate import Allocate
    from ace_ext.pruning.stages.alps import Alps
    from ace_ext.pruning.stages.distill import Distill
    from ace_ext.pruning.stages.dsnot import Dsnot
    from ace_ext.pruning.stages.mean_swaps import MeanSwaps
    from ace_ext.pruning.stages.mean_update import MeanUpdate
    from ace_ext.pruning.stages.obs import Obs
    from ace_ext.pruning.stages.quantize import Quantize
    from ace_ext.pruning.stages.swaps import Swaps
    from ace_ext.pruning.stages.thanos import Thanos
    from ace_ext.pruning.stages.train import Train

Kind = TypeVar("Kind", bound=Stage)

KINDS: tuple[type[Stage], ...] = (Collect, Divide, Score, Refine, Solve, Round, TrainBlock, TrainModel)
"""The kinds of stages in the order in which they run. A method has at most one of each."""

STAGES: Registry[type[Stage]] = Registry("stage", files(__name__, __path__, "STAGE"))
"""Every stage by name. Methods do not contain the name ``score``: a score stage is written as its metric."""


def register(stage: type[Stage]) -> None:
    """Registers a stage that is not a file of this package.

    Raises:
        ValueError: the name is taken.
    """
    STAGES.add(stage)


def stages_of(kind: type[Kind]) -> dict[str, type[Kind]]:
    """The registered stages of a kind, by name."""
    return {name: stage for name, stage in STAGES.items() if issubclass(stage, kind)}


def __getattr__(name: str) -> type[Stage]:
    """The class of a stage, whose file is imported here: a method needs few of them."""
    if name in __all__:
        return STAGES["".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name)[1:]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "KINDS",
    "STAGES",
    "Admm",
    "Allocate",
    "Alps",
    "BlockSizes",
    "Collect",
    "Distill",
    "Divide",
    "Dsnot",
    "MatrixStage",
    "MeanSwaps",
    "MeanUpdate",
    "Obs",
    "Problem",
    "Quantize",
    "Refine",
    "Round",
    "Score",
    "Solve",
    "Solved",
    "Stage",
    "Swaps",
    "Thanos",
    "Train",
    "TrainBlock",
    "TrainModel",
    "Units",
    "overflow",
    "register",
    "stages_of",
]
