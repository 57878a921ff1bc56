"""Saves and restores the state that torch keeps for each thread, so that alternating computations in one thread each
have their own.

The private names of torch used here are those that its own modes call when they are entered and left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ace_ext.ops._extension import compiled


@dataclass(frozen=True)
class TorchState:
    """Gradients, autocast, the modes that intercept calls, the handler of warnings, and the stream of a GPU. Inference
    mode is not among them: torch can only enter and leave it (:attr:`inference`)."""

    inference: bool
    gradients: bool
    autocast: tuple[tuple[str, bool, torch.dtype, bool], ...]
    """For each kind of device: whether autocast is on, its dtype, and whether casts are cached (the same for all)."""
    intercepts: Any
    """Whether subclasses and modes intercept calls."""
    modes: tuple[tuple[Any, ...], tuple[Any, ...]]
    """Those that intercept functions, and those that intercept ops."""
    warnings: int
    """The address of the handler. A call from Python keeps its own on its stack until it returns, so that of a
    computation that waits must not stay in use."""
    stream: "torch.cuda.Stream | None"

    @property
    def function_modes(self) -> tuple[Any, ...]:
        """The modes that intercept functions."""
        return self.modes[0]

    @property
    def dispatch_modes(self) -> tuple[Any, ...]:
        """The modes that intercept ops."""
        return self.modes[1]

    @classmethod
    def now(cls, device: torch.device) -> "TorchState":
        """The present state of this thread. ``device``: the device that computes."""
        caches = torch.is_autocast_cache_enabled()
        kinds = dict.fromkeys(("cpu", device.type))
        functions, dispatches = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), caches) for kind in kinds),
            torch._C._get_torch_function_state(),  # type: ignore[attr-defined]
            (
                tuple(torch._C._get_function_stack_at(i) for i in range(functions)),
                tuple(torch._C._get_dispatch_stack_at(i) for i in range(dispatches)),
            ),
            compiled().warning_handler(),
            torch.cuda.current_stream(device) if device.type == "cuda" else None,  # not run on a GPU
        )

    def put(self) -> None:
        """Restores this state, except inference mode."""
        torch.set_grad_enabled(self.gradients)
        for kind, enabled, dtype, caches in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_cache_enabled(caches)
        torch._C._set_torch_function_state(self.intercepts)  # type: ignore[attr-defined]
        _replace(
            self.function_modes,
            torch._C._len_torch_function_stack,
            torch._C._pop_torch_function_stack,
            torch._C._push_on_torch_function_stack,
        )
        _replace(
            self.dispatch_modes,
            torch._C._len_torch_dispatch_stack,
            lambda: torch._C._pop_torch_dispatch_stack(None),
            torch._C._push_on_torch_dispatch_stack,
        )
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)
        compiled().set_warning_handler(self.warnings)


def _replace(
    modes: Sequence[Any], count: Callable[[], int], pop: Callable[[], object], push: Callable[[Any], object]
) -> None:
    while count():
        pop()
    for mode in modes:
        push(mode)
