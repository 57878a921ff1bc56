"""Mixtures of experts whose weights are fused in tensors ``[experts, d_out, d_in]``, as transformers 5 keeps them.

Each expert's matrix becomes an ``nn.Linear`` of its own that shares the fused tensor's memory, so that statistics,
masks and solvers need no code for experts. While a block runs, the experts' products are computed by these Linears.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ace_ext.models._transformers import eager_experts, holds_output_first_experts


class ExpertLinear(nn.Linear):
    """A Linear without bias whose inputs ``[tokens, d_in]`` have another number of tokens in every call.

    Made on the meta device with shape ``[rows, columns]``; :meth:`FusedExperts.bind` gives it its weight.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """``x [tokens, columns]`` to ``[tokens, rows]``."""
        return filled_linear(x, self.weight)


def filled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for ``x [tokens, d_in]``, ``W [d_out, d_in]``: ``[tokens, d_out]``. In half precision on a CPU, ``x`` is
    padded with zero rows to :func:`filled_rows`.

    There torch compiles a kernel for every new shape, which takes about as long as the product, and keeps about 2 MB
    for each of the last 1,024 shapes.
    """
    missing = filled_rows(len(x)) - len(x)
    if x.device.type != "cpu" or x.dtype == torch.float32 or not missing:
        return functional.linear(x, weight)
    return functional.linear(functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


def filled_rows(count: int) -> int:
    """``count`` rounded up to a multiple of 64, from 512 on to a multiple of an eighth to a quarter of it: four
    different results for each doubling."""
    step = max(64, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


@dataclass(frozen=True)
class FusedExperts:
    """One fused tensor ``[experts, d_out, d_in]`` of a block, and a Linear for each of its experts."""

    owner: nn.Module
    name: str
    """Of the tensor in the block, like ``mlp.experts.down_proj``."""
    linears: Mapping[str, nn.Linear]
    """In the order of the experts, by name in the block: ``mlp.experts.3.down_proj``."""

    @property
    def tensor(self) -> Tensor:
        """The parameter ``[experts, d_out, d_in]`` as it is now."""
        return self.owner.get_parameter(self.name.rpartition(".")[2])

    def bind(self) -> None:
        """Makes the Linears share the memory of :attr:`tensor`. To be called after the parameter was replaced."""
        for weight, linear in zip(self.tensor.detach(), self.linears.values(), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)


def find_experts(module: nn.Module) -> list[FusedExperts]:
    """The fused tensors of a block whose experts' matrices ``W`` are used as ``x Wᵀ``."""
    found = []
    for path, owner in module.named_modules():
        if not holds_output_first_experts(owner):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() == 3:
                count, rows, columns = parameter.shape
                names = [f"{path}.{expert}.{name}" for expert in range(count)]
                linears = {child: ExpertLinear(columns, rows) for child in names}
                found.append(FusedExperts(owner, f"{path}.{name}", linears))
                found[-1].bind()
    return found


@contextmanager
def through_linears(experts: Sequence[FusedExperts]) -> Iterator[None]:
    """While it lasts, the experts compute one after the other, and each of their products is a call of its Linear, so
    that the Linear's hooks see the expert's inputs and outputs."""
    if not experts:
        yield
        return
    with eager_experts(fused.owner for fused in experts), _Redirected(experts):
        yield


class _Redirected(TorchFunctionMode):
    """Redirects ``linear(x, tensor[expert])`` to the expert's Linear, recognised by the weight's address."""

    def __init__(self, experts: Sequence[FusedExperts]) -> None:
        super().__init__()
        linears = [linear for fused in experts for linear in fused.linears.values()]
        self._linears = {linear.weight.data_ptr(): linear for linear in linears}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and len(args) == 2 and not kwargs:
            linear = self._linears.get(args[1].data_ptr())
            if linear is not None and args[1].shape == linear.weight.shape:
                return linear(args[0])  # this mode is off in here, so the Linear's own product is the real one
        return func(*args, **(kwargs or {}))
