"""The router's choice in a call of a module of experts, and the tokens that an expert sees by it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def router_choice(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The numbers of the experts ``[tokens, k]`` and their weights of the same shape, among the arguments after the
    first; None if these are not there, or not alone."""
    given = [x for x in [*args, *kwargs.values()][1:] if isinstance(x, Tensor)]
    indices = [x for x in given if not x.is_floating_point()]
    weights = [x for x in given if x.is_floating_point()]
    if len(indices) != 1 or len(weights) != 1 or indices[0].shape != weights[0].shape:
        return None
    return indices[0], weights[0]


def routed(chosen: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Of ``chosen [tokens, k]`` the places and the tokens ``[n]`` of an expert, in the order in which it sees them."""
    place, token = (chosen == expert).T.nonzero(as_tuple=True)
    return place, token
