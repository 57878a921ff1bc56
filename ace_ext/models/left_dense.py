"""The weights of a model that are not pruned: routers, convolutions, other parameters that no matrix product reads, and
weights outside the blocks. They are listed. A model is refused if they are a large share of a block."""

import re
from collections.abc import Collection, Iterable, Iterator

from torch import nn

from ace_ext.dense_weights import NO_MATRIX, NOT_CALLED, OUTSIDE, DenseWeight
from ace_ext.errors import InputError
from ace_ext.models._transformers import output_head, predicts_tokens, token_embedding
from ace_ext.models.fused_weights import FusedWeight

_ROUTER = re.compile(r"(^|\.)\w*router\w*(\.|$)")
"""Matches names of routers anywhere in a block."""
_CHOOSES = re.compile(r"(^|\.)(gate|wg|shared_expert_gate|classifier)(\.|$)")
"""Matches names of routers that are next to the experts."""


def expert_lists(module: nn.Module) -> dict[str, int]:
    """The lists of experts in a block, by name, with the number of experts. A list counts if a router is next to it."""
    lists = {name: len(m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    return {name: count for name, count in lists.items() if _choosing(module, name, count)}


def routers(module: nn.Module, fused: Iterable[FusedWeight]) -> set[str]:
    """The names in the block of the matrices that choose among experts, or scale the output of a shared expert. They
    stay dense: they are tiny, and a wrong choice of experts costs more than a wrong weight.

    They are found by name. In the smallest module that holds more than the experts, they are also found by shape: as
    many rows as there are experts, or one row.
    """
    named = ((name, p) for name, p in module.named_parameters() if p.dim() == 2)
    found = {name for name, _ in named if _ROUTER.search(name.rpartition(".")[0])}
    counts = {h.name.rpartition(".")[0]: h.layout.count for h in fused if h.layout.routed} | expert_lists(module)
    for holder, count in counts.items():
        found |= _choosing(module, holder, count)
    return found - {h.name for h in fused}


def _choosing(module: nn.Module, holder: str, count: int) -> set[str]:
    """The matrices next to ``count`` experts that choose among them, by name in the block."""
    return {
        name
        for name, p in _beside(module, holder)
        if p.dim() == 2 and (p.shape[0] in (1, count) or _CHOOSES.search(name.rpartition(".")[0]))
    }


def _beside(module: nn.Module, holder: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters next to the module ``holder`` of experts, by name in the block."""
    found: list[tuple[str, nn.Parameter]] = []
    around = holder
    while around and not found:
        around = around.rpartition(".")[0]
        own = module.get_submodule(around).named_parameters(prefix=around)
        found = [(name, p) for name, p in own if not name.startswith(f"{holder}.")]
    return found


def other_weights(module: nn.Module, fused: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a block with two or more dimensions that are in no Linear and not in ``fused``, by name in the
    block. Embeddings and biases are left out."""
    for owner, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            continue
        for leaf, parameter in child.named_parameters(recurse=False):
            name = f"{owner}.{leaf}".lstrip(".")
            if parameter.dim() > 1 and name not in fused and not leaf.endswith("bias"):
                yield name, parameter


def check_share(block: str, module: nn.Module, dense: Iterable[DenseWeight], limit: float) -> None:
    """Checks the share of a block's weights that stay dense although no option asks for it.

    Raises:
        InputError: the share is above ``limit``. It names the largest weight.
    """
    unasked = [weight for weight in dense if weight.reason in (NO_MATRIX, NOT_CALLED)]
    total = sum(p.numel() for p in module.parameters())
    share = sum(weight.size for weight in unasked) / max(1, total)
    if not unasked or share <= limit:
        return
    largest = max(unasked, key=lambda weight: weight.size)
    why = "is in no layout that can be pruned" if largest.reason == NO_MATRIX else "is not called with these inputs"
    names = dict.fromkeys(_in_block(weight.name, block) for weight in unasked)
    raise InputError(
        f"{largest.name} {list(largest.shape)} {why}: {share:.0%} of {block} would stay dense; to leave that dense on "
        f"purpose, pass --max-dense {min(1.0, int(share * 100 + 1) / 100)}, or --skip {any_of(names)} (in Python "
        "max_dense=, skip=)"
    )


def _in_block(name: str, block: str) -> str:
    return name.removeprefix(f"{block}.").removesuffix(".weight")


def any_of(names: Iterable[str]) -> str:
    """A quoted regular expression for any of these names, for a shell and for Python. A dot also matches itself."""
    return f"'{'|'.join(names)}'"


def outside(model: nn.Module, blocks: Iterable[nn.Module]) -> list[DenseWeight]:
    """The matrices that are in none of the blocks. Embeddings, the LM head and biases are left out."""
    left = {id(p) for block in blocks for p in block.parameters()}
    ends = [output_head(model), token_embedding(model) if predicts_tokens(model) else None]
    for module in (*ends, *(m for m in model.modules() if isinstance(m, nn.Embedding))):
        left |= {id(p) for p in module.parameters()} if module is not None else set()
    named = ((name, p) for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in left)
    return [DenseWeight(name, tuple(p.shape), OUTSIDE) for name, p in named if not name.endswith("bias")]
