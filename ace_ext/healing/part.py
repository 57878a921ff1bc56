"""Training some blocks together: the steps, the measurements on what is held out, and the best weights found."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.healing.batches import order_of
from ace_ext.healing.context import HealContext
from ace_ext.healing.settings import WARM_UP, HealSettings
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models.blocks import Block
from ace_ext.pruning.stages.distill import HIGHEST_RATE, RATE
from ace_ext.records import KL, Healing, finite

CHECKS, FEW_CHECKS, STEPS_BETWEEN = 8, 4, 4
"""A window is measured on the held-out text at most 8 times while it is trained, and more than 4 times only if at least
4 steps lie between. With a large vocabulary a measurement takes half as long as a step."""
BACK_OFF = 0.3
"""The factor that lowers the learning rate when the model has become worse than at the start of its window."""
MUCH_WORSE = 1.5
"""From this multiple of the loss at the start on. Below it, a measurement above the start lowers the rate only if the
one before it was above the start too, and not higher. Near the peak of the rate the loss is often a little higher than
at the start, and falls with the rate: SmolLM2-135M without 27 % of its neurons, 65,536 tokens, rate 0.002, had 1.04
times the loss after 8 steps. It ended with a mean perplexity of 41.5; with a lower rate from there, 43.3."""
POINTS = 100
"""The approximate number of points of the loss curve in a report."""


class Trainee(Protocol):
    """What a :class:`Part` trains."""

    @property
    def batches(self) -> int:
        """The number of batches to train on."""
        ...

    def measure(self) -> float:
        """The mean loss of the tokens that are held out."""
        ...

    def step_(self, batch: int, learning_rate: float) -> tuple[float, int]:
        """One step of training on a batch; the loss before it, summed over its tokens, and their number."""
        ...


def new_notes() -> dict[str, Any]:
    """The notes of a journal before the first step of the first window.

    ``part``: the window in training, ``rate``: the peak of the learning rate, ``step``: steps done, ``saved``: whether
    the journal holds tensors of this window, ``before``, ``start`` and ``best``: losses on the held-out text before all
    windows and before this one, and the lowest, ``losses``, ``checks`` and ``backed_off``: as in
    :class:`ace_ext.records.Healing`, ``pending``: losses since the last point, ``tokens``: trained on, ``zeros``: the
    number of zeros in the windows that are done.
    """
    notes = {"part": 0, "step": 0, "saved": False, "before": None, "best": None, "tokens": 0, "zeros": 0, "rate": None}
    return {**notes, "seconds": 0.0, "start": None, "losses": [], "checks": [], "pending": [], "backed_off": []}


def healing_of(
    notes: Mapping[str, Any], settings: HealSettings, parts: int, held_out: int, loss_of: str = KL
) -> Healing:
    """What a distillation did, from the notes after it; other arguments as the fields of :class:`Healing`."""
    return Healing(
        settings=asdict(settings) | {"learning_rate": notes["rate"]},
        tokens=notes["tokens"],
        steps=notes["step"],
        parts=parts,
        held_out=held_out,
        loss_before=notes["before"],
        loss_after=notes["best"],
        zeros=notes["zeros"],
        seconds=notes["seconds"],
        losses=[(step, loss) for step, loss in notes["losses"]],
        checks=[(step, loss) for step, loss in notes["checks"]],
        backed_off=notes["backed_off"],
        loss_of=loss_of,
    )


class Part:
    """The training of one window of blocks.

    Args:
        trainee: takes the steps, with ``trainers``.
        blocks: all blocks of the model.
        steps: the indices of its steps among all steps.
        trainers: the trainers of its blocks, by the block's index.
        total: the number of steps of all windows.
        settings: how it is trained.
        context: the journal (its notes are those of :func:`new_notes`) and the observer.
    """

    def __init__(
        self,
        trainee: Trainee,
        blocks: Sequence[Block],
        steps: range,
        trainers: dict[int, BlockTrainer],
        total: int,
        settings: HealSettings,
        context: HealContext,
    ) -> None:
        self._trainee, self._blocks, self._steps = trainee, blocks, steps
        self._trainers, self._settings = trainers, settings
        self._journal, self._observer = context.journal, context.observer
        self._notes = context.journal.notes
        self._point = max(1, total // POINTS)
        self._clock = time.perf_counter()
        self._best = {i: trainer.snapshot() for i, trainer in trainers.items()}

    def train_(self) -> None:
        """Trains the blocks in place. They end with the best weights that were measured, those at the start
        included.

        Raises:
            InputError: the loss at the start is not finite.
        """
        if self._notes["saved"]:
            self._restore_()
        elif self._notes["before"] is None:
            loss = self._trainee.measure()
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss of the pruned model on the held-out samples must be finite to train it (got {loss}): "
                    "the outputs of the dense or of the pruned model are not; load them as bfloat16 or float32, and "
                    "check the weights outside the blocks"
                )
            self._notes.update(before=loss, best=loss)
            self._note_check(loss)
        if self._notes["rate"] is None:
            self._notes["rate"] = self._settings.learning_rate or rate_of(self._notes["before"])
        if self._notes["start"] is None:
            self._notes["start"] = self._notes["best"]
        with contextlib.ExitStack() as contexts:
            for trainer in self._trainers.values():
                contexts.enter_context(trainer.gradients())
            while self._notes["step"] < self._steps.stop:
                self._step_()
                if self._journal.due():
                    self._save()
        self._save()
        for index, trainer in self._trainers.items():
            trainer.put_(self._best[index])
            trainer.check(self._blocks[index])
        for index in self._trainers:
            self._journal.write(self._blocks[index])
        zeros = sum(trainer.pruned for trainer in self._trainers.values())
        self._notes.update(part=self._notes["part"] + 1, saved=False, start=None, zeros=self._notes["zeros"] + zeros)
        self._journal.save()

    def _step_(self) -> None:
        notes = self._notes
        batch = order_of(self._trainee.batches, notes["step"], self._settings.seed)
        rate = notes["rate"] * BACK_OFF ** len(notes["backed_off"])
        rate *= schedule(notes["step"] - self._steps.start, len(self._steps))
        loss, tokens = self._trainee.step_(batch, rate)
        notes["step"] += 1
        notes["tokens"] += tokens
        notes["pending"].append(loss / max(1, tokens))
        self._observer.step(notes["step"], notes["pending"][-1])
        if len(notes["pending"]) >= self._point or notes["step"] == self._steps.stop:
            notes["losses"].append([notes["step"], finite(sum(notes["pending"]) / len(notes["pending"]))])
            notes["pending"].clear()
        if self._is_check(notes["step"] - self._steps.start):
            self._check()

    def _is_check(self, done: int) -> bool:
        return done % math.ceil(len(self._steps) / checks_of(len(self._steps))) == 0 or done == len(self._steps)

    def _check(self) -> None:
        """Measures the weights, and keeps them if they are the best so far. If the learning rate is too high, goes back
        to the best ones and lowers it."""
        loss = self._trainee.measure()
        rising = self._rises_to(loss)
        self._note_check(loss)
        if loss < self._notes["best"]:  # False for NaN
            self._notes["best"] = loss
            for index, trainer in self._trainers.items():  # one by one, so that old and new never exist together
                self._best[index] = trainer.snapshot()
        elif not loss <= (1.0 if rising else MUCH_WORSE) * self._notes["start"]:  # True for NaN
            self._notes["backed_off"].append(self._notes["step"])
            for index, trainer in self._trainers.items():
                trainer.restart_(self._best[index])

    def _rises_to(self, loss: float) -> bool:
        """Whether the last measurement of this window, since its rate was last lowered, was above the start, and
        ``loss`` is not below it."""
        step, last = self._notes["checks"][-1]
        since = max([self._steps.start, *self._notes["backed_off"]])
        return bool(step > since and loss >= last > self._notes["start"])  # a loss that is not finite lowered the rate

    def _note_check(self, loss: float) -> None:
        self._notes["checks"].append([self._notes["step"], finite(loss)])
        self._observer.check(self._notes["step"], loss)

    def _save(self) -> None:
        now = time.perf_counter()
        self._notes.update(seconds=self._notes["seconds"] + now - self._clock, saved=True)
        self._clock = now
        self._journal.save(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """All tensors that the rest of the training depends on, block by block."""
        for index, trainer in self._trainers.items():
            best = {f"{child}/best": tensor for child, tensor in self._best[index].items()}
            yield str(index), trainer.state() | best

    def _restore_(self) -> None:
        for index, trainer in self._trainers.items():
            saved = self._journal.tensors(str(index))
            trainer.restore_(saved)
            self._best[index] = {child: saved[f"{child}/best"].to(trainer.device) for child in trainer.weights}


def rate_of(divergence: float) -> float:
    """The default learning rate of a causal language model whose held-out divergence is so large at the start. Rounding
    may leave a divergence of almost nothing slightly below 0."""
    rate = RATE * max(divergence, 0.0) ** 0.5  # NaN stays NaN
    return rate if rate < HIGHEST_RATE else HIGHEST_RATE  # also for a loss that is not finite


def checks_of(steps: int) -> int:
    """How often a window is measured at most while it is trained in so many steps."""
    return min(CHECKS, max(FEW_CHECKS, steps // STEPS_BETWEEN))


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak: a linear rise, then a half cosine to 0."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))
