"""Runs several batches through one block in lockstep: each stops at a Linear until all have come to it.

So the Linears of a block can be pruned in their order, each from inputs that passed the pruned ones before it, with one
forward pass of each batch in place of one for each step.
"""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models._transformers_layouts import computes_experts, eager_experts
from ace_ext.models.blocks import Block
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, run_block
from ace_ext.process_memory import available_bytes
from ace_ext.process_threads import most_threads


class _Abandoned(BaseException):
    """Ends a forward that is not wanted any more. Never leaves this file."""


class _Forward:
    """The forward of one batch. It has a thread of its own only because that can stop in the middle of a function: of
    all these threads and the one that made them, one runs at a time."""

    def __init__(self, compute: Callable[[], Tensor], settings: Callable[[], ExitStack]) -> None:
        self._compute, self._settings = compute, settings
        self._go, self._rest = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: BaseException | None = None
        self._abandoned = False
        self.output: Tensor | None = None
        self.stop: tuple[str, Tensor] | None = None
        self.admitted: dict[str, Tensor] = {}

    def run(self) -> Tensor | None:
        """Runs until the forward stops or ends; its output if it ended."""
        self.stop = None
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise InputError(
                    f"batch_tokens of collect must leave so few batches that each can have a thread ({error}); raise it"
                ) from error
        self._go.release()
        self._rest.acquire()
        if self._error is not None:
            raise self._error
        output, self.output = self.output, None
        return output

    def arrive(self, child: str, x: Tensor) -> None:
        """Called in the forward's own thread by a Linear that is about to run: stops unless it may pass."""
        while self.admitted.pop(child, None) is not x:
            self.stop = (child, x)
            self._rest.release()
            self._go.acquire()
            if self._abandoned:
                raise _Abandoned

    def abandon(self) -> None:
        """Ends the thread."""
        self._abandoned = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()

    def _work(self) -> None:
        try:
            self._go.acquire()
            if not self._abandoned:
                with self._settings():
                    self.output = self._compute()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again by run(), in the thread that waits
            self._error = error
        self._rest.release()


def _settings_here(device: torch.device) -> Callable[[], ExitStack]:
    """What torch keeps for each thread, as it is in this one: to be entered in another."""
    inference, kind = torch.is_inference_mode_enabled(), device.type
    cast, casts = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def settings() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, cast, casts))
        if stream is not None:  # not run on a GPU
            stack.enter_context(torch.cuda.stream(stream))  # its device too
        return stack

    return settings


class Lockstep:
    """The forwards of several batches through one block, as a context manager; leaving it ends those that have not.

    Args:
        block: with its weights in memory.
        forwards: one for each batch; each runs the block (:func:`ace_ext.models.replay.run_block`), without gradients.
        device: where the block runs.
    """

    def __init__(self, block: Block, forwards: Sequence[Callable[[], Tensor]], device: torch.device) -> None:
        self._block = block
        settings = _settings_here(device)
        self._forwards = [_Forward(compute, settings) for compute in forwards]
        self._running: _Forward | None = None
        self._left = ExitStack()

    def __enter__(self) -> "Lockstep":
        # For all of them at once: a forward that ends would otherwise restore it while others still run.
        self._left.enter_context(eager_experts(held.owner for held in self._block.held if computes_experts(held.owner)))
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


PAUSED_BYTES = 2**19
"""Measured: resident memory of the thread of an unfinished forward, with 64 to 1,024 of them."""
TEAM_BYTES = 2**17
"""Measured: that of one more OpenMP thread in its team."""


def paused_bytes(batches: int, device: torch.device | str) -> int:
    """Bytes of the device's memory that the threads of unfinished forwards hold; what waits on a GPU is in tensors."""
    if torch.device(device).type != "cpu":
        return 0
    return batches * (PAUSED_BYTES + (torch.get_num_threads() - 1) * TEAM_BYTES)


def threads_fit(batches: int, device: torch.device) -> bool:
    """Whether as many unfinished forwards as there are batches keep at most half of the threads that the system
    allows. On the CPU each has its own team of OpenMP threads, which lasts as long as its thread."""
    allowed = most_threads()
    team = torch.get_num_threads() if device.type == "cpu" else 1
    return allowed is None or batches * team <= allowed // 2


def forwards_fit(block: Block, hidden: HiddenStates, device: torch.device) -> bool:
    """Whether what the batches' unfinished forwards through a block hold takes at most half of the free memory."""
    widest = max(linear.in_features for linear in block.linears.values())
    rows = [math.prod(shape[:-1]) for shape in hidden.layout.shapes]
    itemsize = block.linears[next(iter(block.linears))].weight.dtype.itemsize
    # As ModelShape.waiting_bytes: before the widest Linear, or in attention.
    held = max(2 * hidden.nbytes + sum(rows) * widest * itemsize, 6 * hidden.nbytes)
    return held + paused_bytes(len(rows), device) <= available_bytes(device) // 2


def keeps_no_state(block: Block, index: int, calls: Sequence[BlockCall], hidden: Sequence[Tensor]) -> bool:
    """Whether forwards of ``block`` that take turns give what they give one after the other: not if a module of it
    notes something in itself that it reads later in the same forward. Tried with two batches and the present weights.

    Sums on a GPU may be rounded otherwise in each run, so outputs count as the same up to a hundredth.
    """
    forwards = [partial(run_block, block, h, call.others[index]) for call, h in zip(calls, hidden, strict=True)]
    expected = [forward() for forward in forwards]
    found: list[Tensor | None] = [None] * len(forwards)
    with Lockstep(block, forwards, hidden[0].device) as lockstep:
        while any(output is None for output in found):
            for i in reversed(range(len(forwards))):  # what one notes last, the other would read
                if found[i] is None:
                    found[i] = lockstep.run(i)
                    stop = lockstep.stop_of(i)
                    if stop is not None:
                        lockstep.admit(i, stop[:1], stop[1])
    pairs = zip(found, expected, strict=True)
    return all(bool((a - b).norm() <= 0.01 * b.norm()) for a, b in pairs if a is not None)
