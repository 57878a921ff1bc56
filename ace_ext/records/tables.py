"""Records of tables outside the blocks that were rounded to a grid."""

from dataclasses import dataclass


@dataclass
class RoundedTable:
    """The token embedding, the LM head, or the weight that both share."""

    names: list[str]
    """All names of its parameter in the model."""
    shape: list[int]
    bits: int
    group: int
    """Columns that share a scale in a row."""
    relative_error: float
    """Mean squared change of a weight, relative to the mean square of the weights."""

    def summary(self) -> str:
        """One line for the table of a report."""
        return f"{self.names[0]}: rounded to {self.bits} bits, relative squared error {self.relative_error:.6f}"
