"""Numbers that are not finite: where they arise, and the weights of a float16 model as they were before."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.replay import Arguments, run_block

NOT_FINITE = "its output holds NaN or infinity"


def is_finite(output: Tensor, token_mask: Tensor | None) -> Tensor:
    """``[]`` bool, on the device: whether ``output [batch, seqlen, d_model]`` is finite in each token of
    ``token_mask [batch * seqlen]`` (None: in all)."""
    finite = torch.isfinite(output.flatten(0, 1)).all(dim=1)
    if token_mask is not None:
        finite = finite | ~token_mask.to(finite.device)
    return finite.all()


def read_at_once(finite: Tensor) -> bool:
    """Whether what :func:`is_finite` gave may be read now: not on a GPU, where a read waits for all that was queued."""
    return finite.is_cpu


def refusal(block: Block, found: str, given: tuple[Tensor, Arguments] | None = None) -> InputError:
    """The error for numbers of a block that are not finite.

    Args:
        block: with its weights in memory.
        found: what was found, for the message.
        given: the block's input and its other arguments: it is run once more, to name the module in which they arise.
    """
    culprit = None if given is None else _first_not_finite(block, *given)
    dtype = str(next(block.module.parameters()).dtype).removeprefix("torch.")
    wider = "" if dtype == "float32" else ": load the model in float32 or bfloat16 (--dtype)"
    return InputError(
        f"{block.name}: {found}{f', first in the output of {culprit}' if culprit else ''}; a weight in or before it is "
        f"damaged, or its numbers are too large for {dtype}{wider}"
    )


def _first_not_finite(block: Block, hidden: Tensor, others: Arguments) -> str | None:
    """The full name of the first module of a block whose output is not finite, when it is run once more; None if all
    are. Hooks of the block's Linears are left out."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not found and isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
            found.append(f"{block.name}.{name}")

    with ExitStack() as hooks:
        for linear in block.linears.values():
            hooks.enter_context(_without_hooks(linear))
        for name, module in block.module.named_modules():
            if name:
                handle = module.register_forward_hook(lambda _, args, out, name=name: look(name, out))
                hooks.callback(handle.remove)
        run_block(block, hidden, others)
    return found[0] if found else None


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    before, after = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before, after


@contextmanager
def restored_if_float16(store: BlockSource, tables: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Puts the float16 parameters of blocks, and ``tables``, back as they were if what happens within fails:
    activations that overflow are met only when blocks before them are pruned already, and ``train`` changes norms and
    biases too. The copies are on the CPU. Other dtypes have the range of float32."""
    weights = [*tables, *(parameter for block in store.blocks for parameter in block.module.parameters())]
    half = [weight for weight in weights if weight.dtype == torch.float16 and not weight.is_meta]
    kept = [(weight, weight.detach().to("cpu", copy=True)) for weight in half]
    try:
        yield
    except BaseException:
        for weight, before in kept:
            weight.detach().copy_(before)
        raise
