"""Weights that stay dense, as a report lists them, and why they do."""

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
"""Why a weight stays dense: it chooses among experts; it is read by no matrix product that is known, like a convolution
or a decay; the user did not select it; no calibration token reaches it; it is in no block."""


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
        """What ``dataclasses.asdict`` made of one, after a way through JSON."""
        return cls(data["name"], tuple(data["shape"]), data["reason"])


def describe_dense(dense: Sequence[DenseWeight], pruned: int) -> list[str]:
    """Lines for a terminal: which kinds of weights stay dense, why, and how much that is beside ``pruned`` weights."""
    kinds: dict[tuple[str, str], list[DenseWeight]] = {}
    for weight in dense:
        kinds.setdefault((kind_of(weight.name), weight.reason), []).append(weight)
    total = sum(weight.size for weight in dense)
    share = total / max(1, total + pruned)
    lines = [f"stay dense: {len(dense)} weights, {share:.2%} of those that are listed here"] if dense else []
    for (kind, reason), weights in kinds.items():
        lines.append(f"  {kind}  {len(weights)} x {'x'.join(map(str, weights[0].shape))}  ({reason})")
    return lines


def kind_of(name: str) -> str:
    """A matrix's name with a star for each number in it, of a block or an expert."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
