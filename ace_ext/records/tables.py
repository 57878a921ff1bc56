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

    def __post_init__(self) -> None:
        """Checks what a report that was edited may hold.

        Raises:
            ValueError: it is no record.
        """
        if not isinstance(self.names, list) or not self.names or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"embeddings: names must be a list of names (got {self.names!r})")
        if not isinstance(self.relative_error, int | float):
            raise ValueError(f"embeddings: relative_error must be a number (got {self.relative_error!r})")

    def summary(self) -> str:
        """One line for the table of a report."""
        return f"{self.names[0]}: rounded to {self.bits} bits, relative squared error {self.relative_error:.6f}"
