"""Replaces the results of some calls of torch's functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class OtherwiseComputed(TorchFunctionMode):
    """Within this context a call returns the result of :meth:`instead`, if there is one. The mode is off inside that
    method."""

    def instead(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        """The result of a call without keyword arguments; None: torch computes it."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = None if kwargs else self.instead(func, args)
        return func(*args, **(kwargs or {})) if found is None else found
