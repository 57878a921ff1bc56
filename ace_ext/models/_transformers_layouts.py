"""The layout of parameters that hold matrices but belong to no ``nn.Linear``, and the names of transformers that tell
it, in addition to those in ``_transformers.py``."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ace_ext.models._transformers import EXPERTS

_TRANSPOSED = "is_transposed"
"""Attribute of a module with fused experts ``[experts, …]``, from version 5 on: whether they are stored as
``[d_in, d_out]``."""

_TRANSPOSED_LINEAR = "Conv1D"
"""The class of a Linear whose weight is ``[d_in, d_out]``."""

_EXPERTS = {
    "DbrxExpertGLU": {"w1": False, "v1": False, "w2": True},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
    "JetMoeParallelExperts": {"weight": False},
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
}
"""Classes of modules with fused experts that do not declare their layout. For each parameter: whether its matrices are
stored as ``[d_in, d_out]``."""

_EXPERT_COUNT = "moe_num_experts"
"""Attribute of a module whose tensors have no dimension for experts: the number of experts."""


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter that holds matrices ``W [d_out, d_in]``, used as ``x Wᵀ``.

    It may have any shape whose last dimension is that of the stored matrices.
    """

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


def computes_experts(module: nn.Module) -> bool:
    """Whether a configuration chooses the code that computes the fused experts of a module. The decorator
    ``use_experts_implementation`` gives such modules attributes for their layout."""
    return hasattr(module, _TRANSPOSED) and hasattr(module, "has_bias")


def layouts_in(module: nn.Module) -> dict[str, Layout]:
    """The module's own parameters that hold matrices, other than an ``nn.Linear``'s, by their names in it. Parameters
    whose layout neither the decorator nor the name of the class tells are left out."""
    if computes_experts(module):
        transposed = bool(getattr(module, _TRANSPOSED))
        own = module.named_parameters(recurse=False)
        return {name: Layout(len(p), transposed) for name, p in own if p.dim() == 3}
    for kind in type(module).__mro__:
        if kind.__name__ == _TRANSPOSED_LINEAR and kind.__module__.startswith("transformers."):
            return {"weight": Layout(transposed=True, routed=False)}
        if kind.__name__ in _EXPERTS:
            turned = _EXPERTS[kind.__name__]
            owned = [(name, p) for name, p in module.named_parameters(recurse=False) if name in turned]
            return {name: Layout(_count(module, p), turned[name]) for name, p in owned}
    return {}


def _count(module: nn.Module, parameter: Tensor) -> int:
    return len(parameter) if parameter.dim() == 3 else int(getattr(module, _EXPERT_COUNT))


@contextlib.contextmanager
def eager_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context these modules compute their fused experts one after another, by ``linear(x, W[e])``."""
    configs = {id(module.config): module.config for module in modules}
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            stack.callback(setattr, config, EXPERTS, getattr(config, EXPERTS))
            setattr(config, EXPERTS, "eager")
        yield
