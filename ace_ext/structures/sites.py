"""What the matrices that read units see in a call of their block, and which tokens an expert's inputs belong to."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.blocks import Block
from ace_ext.models.replay import Arguments, run_block
from ace_ext.structures.routes import routed, router_choice
from ace_ext.structures.search import UnitsOfBlock

HELD_OUT = 8
"""One of this many samples (or of this many tokens, if there are fewer samples) is held out from a fit."""


@dataclass(frozen=True)
class UnitRun:
    """What a call of a block gave, per token."""

    inputs: Tensor  # [tokens, columns], of the last matrix
    product: Tensor  # [tokens, d_out], its output
    output: Tensor  # [all tokens, d_model], the block's
    tokens: Tensor | None = None
    """Which of all tokens these are, int64; None: all, or an expert's that it does not say."""

    def chosen(self, used: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens count, and which are held out, bool, from the same for all tokens.

        Raises:
            InputError: it is not known which tokens these are, and some do not count.
        """
        if self.tokens is not None:
            return used[self.tokens], back[self.tokens]
        if len(self.inputs) == len(used):
            return used, back
        if not bool(used.all()):
            raise InputError(
                "remove: the experts of this class do not say which tokens they see, so padding would count; give "
                "samples without padding"
            )
        places = torch.arange(len(self.inputs), device=used.device)
        return torch.ones_like(places, dtype=torch.bool), places % HELD_OUT == HELD_OUT - 1


def seen(block: Block, units: Sequence[UnitsOfBlock], hidden: Tensor, others: Arguments) -> list[UnitRun | None]:
    """What the last matrix of each of ``units`` sees in one call; None of an expert that sees no token.

    Raises:
        InputError: the last matrix of a part that is no expert is not called once with every token.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {own.last: [] for own in units}
    with ExitStack() as hooks:
        for name, calls in found.items():
            hook = lambda _, x, y, calls=calls: calls.append((x[0], y))  # noqa: E731
            hooks.callback(block.linears[name].register_forward_hook(hook).remove)
        routes = hooks.enter_context(_routes(block))
        output = run_block(block, hidden, others)
    rows = output.reshape(-1, output.shape[-1])
    return [_run(block, own, found[own.last], rows, routes) for own in units]


def _run(
    block: Block, own: UnitsOfBlock, calls: list[tuple[Tensor, Tensor]], output: Tensor, routes: dict[str, Tensor]
) -> UnitRun | None:
    if own.expert is not None and not calls:
        return None
    if len(calls) != 1 or (own.expert is None and calls[0][0][..., 0].numel() != len(output)):
        raise InputError(
            f"remove: {block.full_name(own.last)} is not called once with every token, so its inputs cannot be removed"
        )
    x, y = calls[0]
    inputs, product = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    tokens: Tensor | None = None
    chosen = routes.get(own.last)
    if own.expert is not None and chosen is not None:
        _, tokens = routed(chosen, own.expert)
        tokens = tokens if len(tokens) == len(inputs) else None
    return UnitRun(inputs, product, output, tokens)


@contextmanager
def _routes(block: Block) -> Iterator[dict[str, Tensor]]:
    """By the name of each expert's Linear the router's choice ``[tokens, k]`` in a call, where a module of experts is
    called with it."""
    found: dict[str, Tensor] = {}

    def choose(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        choice = router_choice(args, kwargs)
        if choice is not None and choice[0].dim() == 2:
            found.update(dict.fromkeys(names, choice[0]))

    with ExitStack() as hooks:
        for fused in block.experts:
            hook = lambda _, args, kwargs, names=list(fused.linears): choose(names, args, kwargs)  # noqa: E731
            hooks.callback(fused.owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found
