"""Matrices that no ``nn.Linear`` owns: experts fused in one tensor, and Linears that are stored transposed.

Each matrix becomes an ``nn.Linear`` that shares the parameter's memory, so that statistics, masks and solvers need no
code for layouts. While a block runs, the products with these matrices are computed by these Linears.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.models._transformers_layouts import Layout, computes_experts, eager_experts, layouts_in
from ace_ext.models.products import OtherwiseComputed


class ExpertLinear(nn.Linear):
    """A Linear without bias. The number of tokens of its inputs ``[tokens, d_in]`` differs from call to call.

    Made on the meta device with shape ``[rows, columns]``; :meth:`FusedWeight.bind` gives it its weight.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """``x [tokens, columns]`` to ``[tokens, rows]``."""
        return filled_linear(x, self.weight)


def filled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for ``x [tokens, d_in]``, ``W [d_out, d_in]``: ``[tokens, d_out]``. In half precision on a CPU, ``x`` is
    padded with zero rows to :func:`filled_rows`.

    torch compiles a kernel there for every new shape. This takes about as long as the product, and about 2 MB are kept
    for each of the last 1,024 shapes.
    """
    missing = filled_rows(len(x)) - len(x)
    if x.device.type != "cpu" or x.dtype == torch.float32 or not missing:
        return functional.linear(x, weight)
    return functional.linear(functional.pad(x, (0, 0, 0, missing)), weight)[: len(x)]


def filled_rows(count: int) -> int:
    """``count`` rounded up to a multiple of 64. From 512 on the step is larger, an eighth to a quarter of ``count``, so
    that there are four different results for each doubling."""
    step = max(64, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


@dataclass(frozen=True)
class FusedWeight:
    """A parameter that several matrices share, or that is stored transposed, and a Linear for each matrix."""

    owner: nn.Module
    name: str
    """The parameter's name in the block, like ``mlp.experts.down_proj``."""
    layout: Layout
    linears: Mapping[str, nn.Linear]
    """The Linears in the stored order, by name in the block: ``mlp.experts.3.down_proj`` for an expert, else the
    owner's name."""

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now."""
        return self.owner.get_parameter(self.name.rpartition(".")[2])

    def bind(self) -> None:
        """Makes the Linears share the memory of :attr:`tensor`. To be called after the parameter was replaced."""
        for weight, linear in zip(self.layout.matrices(self.tensor.detach()), self.linears.values(), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)


def fused_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Layout]]:
    """The fused weights below a module: owner, its name, the parameter's name in it, and layout."""
    for path, owner in module.named_modules():
        for leaf, layout in layouts_in(owner).items():
            yield owner, path, leaf, layout


def names_of(path: str, leaf: str, layout: Layout) -> list[str]:
    """The names of a parameter's matrices. ``path``: the name of its owner."""
    if not layout.routed:
        return [path]
    return [".".join(filter(None, (path, str(expert), leaf))) for expert in range(layout.count)]


def find_fused(module: nn.Module) -> list[FusedWeight]:
    """The fused weights of a block, bound to a Linear for each matrix."""
    found = []
    for owner, path, leaf, layout in fused_parameters(module):
        _, rows, columns = layout.matrices(owner.get_parameter(leaf).detach()).shape
        kind = ExpertLinear if layout.routed else _plain
        linears = {child: kind(columns, rows) for child in names_of(path, leaf, layout)}
        found.append(FusedWeight(owner, ".".join(filter(None, (path, leaf))), layout, linears))
        found[-1].bind()
    return found


def _plain(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, device="meta")


@contextmanager
def through_linears(
    fused: Sequence[FusedWeight], used_directly: Mapping[str, nn.Linear] | None = None
) -> Iterator[None]:
    """Within this context experts compute one after another, and each product with a fused matrix is a call of its
    Linear. The Linear's hooks then see inputs and outputs.

    ``used_directly``: other Linears whose weight the block may multiply by without calling them.
    """
    if not fused and not used_directly:
        yield
        return
    with eager_experts(h.owner for h in fused if computes_experts(h.owner)), _Redirected(fused, used_directly or {}):
        yield


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
_BATCHED = (torch.bmm, Tensor.bmm)


class _Redirected(OtherwiseComputed):
    """Redirects products with known matrices to their Linears. A matrix is recognised by its address and strides. The
    mode is off inside the Linear's call, so torch computes the product there.
    """

    def __init__(self, fused: Sequence[FusedWeight], used_directly: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        own = [linear for matrices in fused for linear in matrices.linears.values()]
        self._own = {linear.weight.data_ptr(): linear for linear in own}
        self._all = self._own | {linear.weight.data_ptr(): linear for linear in used_directly.values()}
        self._fused = {matrices.tensor.data_ptr(): matrices for matrices in fused}

    def instead(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of a product with a known matrix ``W``; None for any other call."""
        if kwargs:
            return None
        if func is functional.linear and len(args) in (2, 3):
            linear = self._own.get(args[1].data_ptr())
            if linear is not None and _same(args[1], linear.weight):
                return _plus(linear(args[0]), args[2] if len(args) == 3 else None)
        elif func in _PRODUCTS and len(args) == 2:
            left, right = args
            linear = self._all.get(right.data_ptr())
            if linear is not None and _same(right, linear.weight.T):  # x Wᵀ
                return _without_bias(linear, left)
            linear = self._all.get(left.data_ptr())
            if linear is not None and _same(left, linear.weight):  # W xᵀ, as state-space layers use it
                return _without_bias(linear, right.transpose(-1, -2)).transpose(-1, -2)
            return self._batch(left, right)
        elif func is torch.addmm and len(args) == 3:
            linear = self._own.get(args[2].data_ptr())
            if linear is not None and _same(args[2], linear.weight.T):
                return linear(args[1]) + args[0]  # type: ignore[no-any-return]
        elif func in _BATCHED and len(args) == 2:
            return self._batch(*args)
        return None

    def _batch(self, x: Tensor, tensor: Tensor) -> Tensor | None:
        """``[experts, tokens, d_out]``: each expert's inputs ``[experts, tokens, d_in]`` times its matrix. Rows of
        zeros belong to tokens that are not routed to the expert. Its Linear does not see them."""
        fused = self._fused.get(tensor.data_ptr())
        if fused is None or x.dim() != 3 or not _same(tensor, fused.layout.matrices(fused.tensor).transpose(1, 2)):
            return None
        outputs = []
        for inputs, linear in zip(x, fused.linears.values(), strict=True):
            routed = inputs.any(dim=1)
            output = inputs.new_zeros(len(inputs), linear.out_features)
            output[routed] = linear(inputs[routed])
            outputs.append(output)
        return torch.stack(outputs)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether tensors at one address are the same matrix."""
    return tensor.shape == other.shape and tensor.stride() == other.stride()


def _without_bias(linear: nn.Linear, x: Tensor) -> Tensor:
    """``x Wᵀ`` by a call of the Linear, so that its hooks run. The bias is taken off during the call: the caller wants
    the product only."""
    bias = linear.bias
    linear.register_parameter("bias", None)
    try:
        output: Tensor = linear(x)
        return output
    finally:
        linear.register_parameter("bias", bias)


def _plus(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias
