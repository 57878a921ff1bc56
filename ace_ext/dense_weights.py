"""Weights that stay dense, and the reasons, as a report lists them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROUTER, NO_MATRIX, SKIPPED, NOT_CALLED, OUTSIDE = (
    "router",
    "no matrix",
    "not selected",
    "not called",
    "outside the blocks",
)
"""Why a weight stays dense: it chooses among experts; no known matrix product reads it (a convolution, a decay); the
user did not select it; no calibration token reaches it; it is outside the blocks."""


@dataclass(frozen=True)
class DenseWeight:
    """A weight that stays dense, by its full name, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DenseWeight":
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        return cls(data["name"], tuple(data["shape"]), data["reason"])


def describe_dense(dense: Sequence[DenseWeight], pruned: int) -> list[str]:
    """Lines for a terminal: which kinds of weights stay dense, why, and their share if ``pruned`` weights are
    pruned."""
    kinds: dict[tuple[str, str], list[DenseWeight]] = {}
    for weight in dense:
        kinds.setdefault((kind_of(weight.name), weight.reason), []).append(weight)
    total = sum(weight.size for weight in dense)
    share = total / max(1, total + pruned)
    lines = [f"stay dense: {len(dense)} tensors, {share:.2%} of the weights that are listed here"] if dense else []
    for (kind, reason), weights in kinds.items():
        lines.append(f"  {kind}  {len(weights)} x {'x'.join(map(str, weights[0].shape))}  ({reason})")
    return lines


def kind_of(name: str) -> str:
    """The name of a matrix with a star for each number, such as that of a block or an expert."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
