"""The interfaces through which a distillation uses files and progress displays, and a journal that does nothing."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ace_ext.models.blocks import Block
from ace_ext.records import Healing


class Journal(Protocol):
    """Records a distillation's state, so that it can be resumed, and writes its result."""

    notes: dict[str, Any]
    """Plain values of the state: those that the earlier run saved last, empty if there was none."""

    def due(self) -> bool:
        """Whether enough time has passed since the last :meth:`save` for another one."""
        ...

    def save(self, tensors: Iterable[tuple[str, Mapping[str, Tensor]]] = ()) -> None:
        """Stores :attr:`notes` and named groups of tensors together: after a crash both come from the same call."""
        ...

    def tensors(self, group: str) -> dict[str, Tensor]:
        """A group of tensors of the last :meth:`save`, on the CPU."""
        ...

    def write(self, block: Block) -> None:
        """Writes a trained block to the output; it is on the disk when this returns."""
        ...


class Observer(Protocol):
    """Is called as a distillation progresses."""

    shown: bool
    """Whether it shows bars. A model that writes text then shows one too."""

    def teacher(self, done: int, blocks: int) -> None:
        """Called when ``done`` of the dense model's ``blocks`` have run."""
        ...

    def start(self, done: int, steps: int, step_tokens: int) -> None:
        """Called before training: an earlier run did ``done`` of the ``steps``, of about ``step_tokens`` tokens
        each."""
        ...

    def step(self, step: int, loss: float) -> None:
        """Called after each step with its number, from 1, and the mean loss of its tokens before the step."""
        ...

    def check(self, step: int, loss: float) -> None:
        """Called when the held-out windows were measured, with the mean loss of their tokens."""
        ...

    def end(self, healing: Healing) -> None:
        """Called when all is done."""
        ...

    def close(self) -> None:
        """Called at the end, also after an error."""
        ...


class NoJournal:
    """Records nothing: for a model in memory."""

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}

    def due(self) -> bool:
        """Never."""
        return False

    def save(self, tensors: Iterable[tuple[str, Mapping[str, Tensor]]] = ()) -> None:
        """Does nothing."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def write(self, block: Block) -> None:
        """Does nothing: the weights of the model in memory are trained in place."""
