"""How many weights are kept: N:M patterns, and the rounding of a sparsity to a count."""

import math
import re
from dataclasses import dataclass

from ace_ext.errors import InputError

MAX_GROUP_M = 32


def keep_count(size: int, sparsity: float) -> int:
    """How many of ``size`` weights are kept: ``size - floor(size * sparsity + 1/2)``. The only place that rounds."""
    return size - math.floor(size * sparsity + 0.5)


@dataclass(frozen=True)
class SparsityPattern:
    """N:M sparsity: ``keep_n`` of each ``group_m`` consecutive weights of a row are kept.

    Other authors use N for the number of pruned weights; 2:4 is the same in both.

    Raises:
        InputError: unless ``0 < keep_n < group_m <= 32``.
    """

    keep_n: int
    group_m: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_n < self.group_m <= MAX_GROUP_M:
            raise InputError(
                f"pattern must be N:M with 0 < N < M <= {MAX_GROUP_M}, N weights kept of M (got {self}); e.g. 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> "SparsityPattern":
        """The pattern of a text like ``"2:4"``.

        Raises:
            InputError: the text does not have this form, or as the class.
        """
        parts = text.split(":")
        if len(parts) != 2 or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts):
            raise InputError(f"pattern must be N:M, N weights kept of M (got {text[:100]!r}); e.g. 2:4")
        return cls(int(parts[0]), int(parts[1]))

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.keep_n / self.group_m

    def __str__(self) -> str:
        return f"{self.keep_n}:{self.group_m}"
