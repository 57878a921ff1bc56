"""The experts of a mixture, each multiplied from its own packed weights.

Engines multiply all experts with one kernel that reads dense weights. Packed experts are multiplied one after the
other, each with the tokens that chose it: few tokens choose few experts, so decoding reads only their weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ace_ext.serving.matrices import Matrix
from ace_ext.serving.product import product_of

_numbers = count()
_mixtures: WeakValueDictionary[int, "Mixture"] = WeakValueDictionary()
"""The mixtures of this process by their numbers, for the op that a compiled model calls."""


@dataclass(frozen=True)
class ExpertOptions:
    """What an engine's layer adds to the products."""

    activate: Callable[[Tensor], Tensor]
    """Of ``[tokens, rows of up]`` to ``[tokens, columns of down]``."""
    weigh_input: bool = False
    """Routing weights multiply the input in place of the output."""
    up_bias: Tensor | None = None
    """``[experts, rows of up]``."""
    down_bias: Tensor | None = None
    """``[experts, rows of down]``."""
    places: Tensor | None = None
    """``[all experts]``: the number of an expert on this rank, or -1; None if all are here in order."""


class Mixture(nn.Module):
    """Products of the experts of a layer.

    Args:
        up: the first matrix of each expert on this rank: gate and up below each other, ``[rows, hidden]``.
        down: the second, ``[hidden, columns]``.
        options: bias, activation and the experts of this rank.
        device: where the weights are to be.
    """

    def __init__(
        self,
        up: Sequence[Matrix | Tensor],
        down: Sequence[Matrix | Tensor],
        options: ExpertOptions,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.up = nn.ModuleList(product_of(one, device) for one in up)
        self.down = nn.ModuleList(product_of(one, device) for one in down)
        self.options = options
        self.number = next(_numbers)
        _mixtures[self.number] = self

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            x: ``[tokens, hidden]``.
            weights: ``[tokens, chosen]``, the routing weights.
            experts: ``[tokens, chosen]``, numbers among all experts.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``x``. Products are summed over experts in float32. A compiled model
            calls this as one opaque op, because the loop depends on the numbers.
        """
        out: Tensor = torch.ops.ace_ext_serving.mixture(x, weights, experts, self.number)
        return out

    def compute(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """:meth:`forward` without the op around it."""
        places, given = self.options.places, experts.to(torch.int64)
        local = given if places is None else places.to(torch.int64)[given]
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(local).tolist():
            if expert < 0:
                continue  # on another rank
            tokens, chosen = (local == expert).nonzero(as_tuple=True)
            share = weights[tokens, chosen].float()[:, None]
            total.index_add_(0, tokens, self._expert(expert, x[tokens], share))
        return total.to(x.dtype)

    def _expert(self, expert: int, x: Tensor, share: Tensor) -> Tensor:
        """The output of one expert, ``[tokens, hidden]`` float32, times the routing weights ``share [tokens, 1]``."""
        options = self.options
        biases = [None if one is None else one[expert] for one in (options.up_bias, options.down_bias)]
        given = (x * share).to(x.dtype) if options.weigh_input else x
        out: Tensor = self.down[expert](options.activate(self.up[expert](given, biases[0])), biases[1])
        return out.float() if options.weigh_input else out.float() * share


@torch.library.custom_op("ace_ext_serving::mixture", mutates_args=())
def _mixture(x: Tensor, weights: Tensor, experts: Tensor, number: int) -> Tensor:
    return _mixtures[number].compute(x, weights, experts)


@_mixture.register_fake
def _(x: Tensor, weights: Tensor, experts: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)
