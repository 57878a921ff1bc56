"""Runs several batches through one block in lockstep: each stops at a Linear until all have reached it.

The Linears of a block are pruned in their order. Each gets inputs that have passed the pruned Linears before it. Each
batch takes one forward pass instead of one for each Linear.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from contextvars import copy_context
from functools import partial

import torch
from greenlet import greenlet
from torch import Tensor

from ace_ext.models._transformers_layouts import computes_experts, eager_experts
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.models.torch_state import TorchState
from ace_ext.process_memory import available_bytes


class _Abandoned(BaseException):
    """Ends a forward that is no longer needed. Never leaves this file."""


class _Forward:
    """The forward of one batch: a greenlet, which can stop in the middle of a function and continue later. It and the
    code that runs it each keep their own state of torch."""

    def __init__(self, compute: Callable[[], Tensor], device: torch.device) -> None:
        self._device = device
        self._work = greenlet(torch.no_grad()(compute))
        self._work.gr_context = copy_context()
        self._caller = TorchState.now(device)
        self.stop: tuple[str, Tensor] | None = None
        self.admitted: dict[str, Tensor] = {}

    def run(self) -> Tensor | None:
        """Runs until the forward stops or ends; its output if it ended."""
        self.stop = None
        return self._resume(self._work.switch)

    def arrive(self, child: str, x: Tensor) -> None:
        """Called in the forward before a Linear runs. It stops the forward unless the Linear was admitted."""
        while self.admitted.pop(child, None) is not x:
            self.stop = (child, x)
            own = TorchState.now(self._device)
            differs = own.inference != self._caller.inference
            with torch.inference_mode(self._caller.inference) if differs else nullcontext():
                try:
                    self._work.parent.switch(None)
                finally:
                    own.put()

    def abandon(self) -> None:
        """Ends the forward where it stopped."""
        if self._work:  # it has begun and not ended
            with suppress(_Abandoned):
                self._resume(lambda: self._work.throw(_Abandoned))

    def _resume(self, switch: Callable[[], Tensor | None]) -> Tensor | None:
        self._caller = TorchState.now(self._device)
        try:
            return switch()
        finally:
            self._caller.put()


class Lockstep:
    """The forwards of several batches through one block, as a context manager. Leaving it ends unfinished forwards.

    Args:
        block: with its weights in memory.
        forwards: one for each batch; each runs the block (:func:`ace_ext.models.replay.run_block`), without gradients.
        device: where the block runs.
    """

    def __init__(self, block: Block, forwards: Sequence[Callable[[], Tensor]], device: torch.device) -> None:
        self._block = block
        self._forwards = [_Forward(compute, device) for compute in forwards]
        self._running: _Forward | None = None
        self._left = ExitStack()

    def __enter__(self) -> "Lockstep":
        # Set once for all forwards: one that ends would otherwise restore it while others still run.
        self._left.enter_context(
            eager_experts(fused.owner for fused in self._block.fused if computes_experts(fused.owner))
        )
        for child, linear in self._block.linears.items():
            hook = lambda _, args, child=child: self._arrive(child, args[0])  # noqa: E731
            self._left.callback(linear.register_forward_pre_hook(hook).remove)
        for forward in self._forwards:
            self._left.callback(forward.abandon)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.close()

    def run(self, i: int) -> Tensor | None:
        """Lets batch ``i`` run until it stops before a Linear, or ends. Returns its output if it ended."""
        self._running = self._forwards[i]
        try:
            return self._forwards[i].run()
        finally:
            self._running = None

    def stop_of(self, i: int) -> tuple[str, Tensor] | None:
        """The Linear before which batch ``i`` waits, by its name in the block, with its input; None once it ended."""
        return self._forwards[i].stop

    def admit(self, i: int, children: Sequence[str], x: Tensor) -> None:
        """Lets batch ``i`` pass these Linears, each once and with the input ``x``."""
        self._forwards[i].admitted |= dict.fromkeys(children, x)

    def _arrive(self, child: str, x: Tensor) -> None:
        if self._running is not None:
            self._running.arrive(child, x)


PAUSED_BYTES = 2**16
"""An upper bound. An unfinished forward of a tiny Llama took at most 30 kB of resident memory, its tensors included,
when 64 to 1,024 forwards were measured."""


def paused_bytes(batches: int, device: torch.device | str) -> int:
    """Bytes of the device's memory that unfinished forwards need in addition to their tensors."""
    return batches * PAUSED_BYTES if torch.device(device).type == "cpu" else 0


def forwards_fit(block: Block, hidden: HiddenStates, device: torch.device) -> bool:
    """Whether the batches' unfinished forwards through a block need at most half of the free memory."""
    widest = max(linear.in_features for linear in block.linears.values())
    rows = [math.prod(shape[:-1]) for shape in hidden.layout.shapes]
    itemsize = block.linears[next(iter(block.linears))].weight.dtype.itemsize
    # As ModelShape.waiting_bytes: before the widest Linear, or in attention.
    waiting = max(2 * hidden.nbytes + sum(rows) * widest * itemsize, 6 * hidden.nbytes)
    return waiting + paused_bytes(len(rows), device) <= available_bytes(device) // 2


def keeps_no_state(block: Block, index: int, calls: Sequence[BlockCall], hidden: Sequence[Tensor]) -> bool:
    """Whether alternating forwards of ``block`` give the same outputs as forwards one after another. They do not if a
    module stores a value in itself and reads it later in the same forward. This is tried with two batches and the
    present weights.

    Sums on a GPU may be rounded differently in each run, so outputs count as equal up to a relative difference of 0.01.
    """
    forwards = [partial(run_block, block, h, call.others[index]) for call, h in zip(calls, hidden, strict=True)]
    expected = [forward() for forward in forwards]
    found: list[Tensor | None] = [None] * len(forwards)
    with Lockstep(block, forwards, hidden[0].device) as lockstep:
        while any(output is None for output in found):
            for i in reversed(range(len(forwards))):  # the other would read the value that one stores last
                if found[i] is None:
                    found[i] = lockstep.run(i)
                    stop = lockstep.stop_of(i)
                    if stop is not None:
                        lockstep.admit(i, stop[:1], stop[1])
    pairs = zip(found, expected, strict=True)
    return all(bool((a - b).norm() <= 0.01 * b.norm()) for a, b in pairs if a is not None)
