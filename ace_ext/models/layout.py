"""How a parameter that no ``nn.Linear`` owns holds matrices ``W [d_out, d_in]`` that are used as ``x Wᵀ``."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter. It may have any shape whose last dimension is that of the stored matrices."""

    count: int = 1
    """How many matrices are stored, one after the other."""
    transposed: bool = False
    """Whether each is stored as ``[d_in, d_out]``."""
    routed: bool = True
    """Whether each is an expert's, so that it sees only the tokens that a router sends it."""

    def matrices(self, parameter: Tensor) -> Tensor:
        """``[count, d_out, d_in]``: a view of the parameter. The rows of a transposed parameter are not contiguous."""
        stored = parameter.view(self.count, -1, parameter.shape[-1])
        return stored.transpose(1, 2) if self.transposed else stored
