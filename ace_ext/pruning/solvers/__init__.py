"""Solvers, which follow the metric. One file each, which declares the solver's name, options, memory and code.

Every file of this package that defines ``SOLVER`` is registered; a file whose name starts with ``_`` is not a solver.
To add a solver, add a file: the configuration, ``--help``, the method specs of ``ace-prune compare``, the memory
estimate and the documentation read the registry. Solvers of a matrix lower ``Σ_i e_i G e_iᵀ``, ``e_i`` the change of
row i and ``G`` the Gram matrix of the inputs. All keep exactly as many weights as the metric would; pruned weights are
+0.0.
"""

from typing import TypeVar

from ace_ext._registry import add, discover
from ace_ext.pruning.solvers._problem import (
    BlockSizes,
    BlockSolver,
    MaskSolver,
    MatrixSolver,
    ModelSolver,
    Problem,
    Solved,
    Solver,
    WeightSolver,
)

Kind = TypeVar("Kind", bound=Solver)

SOLVERS: dict[str, dict[str, Solver]] = {"refine": {}, "update": {}}
"""The solvers of each stage by name."""


def register(solver: Solver) -> None:
    """Registers a solver that is not a file of this package.

    Raises:
        ValueError: the name is taken by another solver of its stage.
    """
    add(SOLVERS[solver.stage], solver, "solver")


def all_solvers() -> list[Solver]:
    """Every registered solver."""
    return [solver for stage in SOLVERS.values() for solver in stage.values()]


def solvers_of(kind: type[Kind]) -> dict[str, Kind]:
    """The registered solvers of a kind, by name."""
    return {solver.name: solver for solver in all_solvers() if isinstance(solver, kind)}


for _solver in discover(__name__, __path__, "SOLVER"):
    register(_solver)

__all__ = [
    "SOLVERS",
    "BlockSizes",
    "BlockSolver",
    "MaskSolver",
    "MatrixSolver",
    "ModelSolver",
    "Problem",
    "Solved",
    "Solver",
    "WeightSolver",
    "all_solvers",
    "register",
    "solvers_of",
]
