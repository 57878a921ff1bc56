"""Mixtures of experts whose weights lie fused in tensors ``[experts, d_out, d_in]``, as transformers 5 keeps them.

Each expert's matrix becomes an ``nn.Linear`` of its own that shares the fused tensor's memory, so that statistics,
masks and solvers need to know nothing of experts. While a block runs, what the experts compute with their matrices goes
through these Linears.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class ExpertLinear(nn.Linear):
    """A Linear without bias whose inputs ``[tokens, d_in]`` have another number of rows in every block."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return filled_linear(x, self.weight)


def filled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for ``x [tokens, d_in]``, computed with zero rows below ``x`` up to one of a few numbers of rows.

    In half precision on a CPU, torch compiles a kernel for every shape that it has not met, in about the time of the
    product, and keeps some 2 MB of each of the last 1,024.
    """
    missing = filled_rows(len(x)) - len(x)
    if x.device.type != "cpu" or x.dtype == torch.float32 or not missing:
        return functional.linear(x, weight)
    return functional.linear(functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


def filled_rows(count: int) -> int:
    """The next multiple of 64, from 512 on of an eighth to a quarter of the number: four to a doubling."""
    step = max(64, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


@dataclass(frozen=True)
class FusedExperts:
    """One fused tensor of a block, and a Linear for each of its experts."""

    owner: nn.Module
    name: str
    """In the block, like ``mlp.experts.down_proj``."""
    linears: dict[str, nn.Linear]
    """In the order of the experts, by name in the block: ``mlp.experts.3.down_proj``."""

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.name.rpartition(".")[2])

    def bind(self) -> None:
        """Lets the Linears share the tensor that is there now; to be called when another one was put in its place."""
        for weight, linear in zip(self.tensor.detach(), self.linears.values(), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def is_router(self, parameter: Tensor) -> bool:
        """Whether a matrix has the shape of the one that chooses among these experts."""
        return tuple(parameter.shape) == (self.tensor.shape[0], self.tensor.shape[2])


def find_experts(module: nn.Module) -> list[FusedExperts]:
    """The fused tensors of a block whose experts' matrices ``W`` are used as ``x Wᵀ``."""
    found = []
    for path, owner in module.named_modules():
        # transformers' own marks: without them, or transposed as in GPT-OSS, nothing says which side is the output.
        if getattr(owner, "is_transposed", True) or getattr(owner, "has_bias", True):
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
    """While it lasts, the experts compute one after the other, and each of their products is a call of a Linear."""
    with ExitStack() as stack:
        for config in {id(fused.owner.config): fused.owner.config for fused in experts}.values():
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = "eager"
        if experts:
            stack.enter_context(_Redirected(experts))
        yield


class _Redirected(TorchFunctionMode):
    """Recognises ``linear(x, tensor[expert])`` by the place of the weight in memory."""

    def __init__(self, experts: Sequence[FusedExperts]) -> None:
        super().__init__()
        linears = [linear for fused in experts for linear in fused.linears.values()]
        self._linears = {linear.weight.data_ptr(): linear for linear in linears}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.linear and len(args) == 2 and not kwargs:
            linear = self._linears.get(args[1].data_ptr())
            if linear is not None and args[1].shape == linear.weight.shape:
                return linear(args[0])  # this mode is off in here, so the Linear's own product is the real one
        return func(*args, **(kwargs or {}))
