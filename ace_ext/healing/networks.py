"""Distillation of a network that is no causal language model: it is trained towards the outputs of the dense one.

Unlike :mod:`ace_ext.healing.distill` it works on whole forwards of a model in memory, beside a copy of the dense one,
since the blocks of such a network are no single chain.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.healing.batches import held_windows, order_of
from ace_ext.healing.part import BACK_OFF, CHECKS, POINTS, schedule
from ace_ext.healing.protocols import Observer
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models._transformers import decoder_of, output_head, plain_call
from ace_ext.models.blocks import Block
from ace_ext.models.replay import first_of, replaced_forward, token_count, with_products
from ace_ext.models.run_mode import frozen, run_mode
from ace_ext.models.token_masks import TokenMasks
from ace_ext.records import Healing, finite

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Steps:
    """Inputs in batches of one gradient step each; the last ``held_out`` are only measured on."""

    batches: list[Inputs]
    held_out: int

    @classmethod
    def of(cls, batches: list[Inputs], tokens: int, settings: HealSettings) -> "Steps":
        """Divides batches, which have ``tokens`` tokens in all, into steps of about the settings' size.

        Raises:
            InputError: there are fewer than two samples, or inputs that cannot be divided into samples.
        """
        samples = sum(_samples(batch) for batch in batches)
        rows = max(1, settings.step_tokens * samples // max(1, tokens))
        if samples < 2:
            raise InputError(f"distill needs at least two samples: one to train on, one to measure on (got {samples})")
        rows = min(rows, max(1, samples // 2))
        cut = [part for batch in batches for part in _cut(batch, rows)]
        return cls(cut, max(1, min(len(cut) // 4, held_windows(samples, settings) // rows)))

    @property
    def trained(self) -> range:
        """The batches to train on."""
        return range(len(self.batches) - self.held_out)

    @property
    def measured(self) -> list[Inputs]:
        """The batches that are held out."""
        return self.batches[len(self.trained) :]


def _samples(batch: Inputs) -> int:
    counts = {len(value) for value in batch.values() if value.dim()}
    if len(counts) != 1:
        raise InputError(f"distill needs inputs of as many samples each (got {sorted(counts)})")
    return counts.pop()


def _cut(batch: Inputs, rows: int) -> Iterator[Inputs]:
    for start in range(0, _samples(batch), rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}


class Loss:
    """What a student is trained on, with the dense model as its teacher.

    With a vocabulary it is ``KL(teacher ‖ student)`` of the logits. Without one, each token's hidden states after the
    last block of each tower are normalized to mean 0 and variance 1, and their mean squared difference is taken:
    ``2 (1 - r)`` for a correlation ``r``.

    Args:
        model: a model of this class.
        blocks: its blocks, in the order of a forward.
    """

    def __init__(self, model: nn.Module, blocks: list[Block]) -> None:
        self._masks = TokenMasks(model)
        self._speaks = output_head(model) is not None
        self._last = _last_blocks(model, [block.name for block in blocks])
        self._options = plain_call(model)

    def __call__(self, student: nn.Module, teacher: nn.Module, batch: Inputs) -> tuple[Tensor, int]:
        """The loss, summed over tokens, and their number."""
        with torch.no_grad():
            wanted, spoken = self._outputs(teacher, batch)
        found, said = self._outputs(student, batch)
        if spoken is not None and said is not None:
            mask = self._masks.of(self._last[-1], batch, found[self._last[-1]])
            teaching = _rows(spoken, mask).float().log_softmax(-1)
            saying = _rows(said, mask).float().log_softmax(-1)
            return functional.kl_div(saying, teaching, reduction="sum", log_target=True), len(saying)
        total, tokens = torch.zeros((), device=next(iter(found.values())).device), 0
        for name, states in found.items():
            mask = self._masks.of(name, batch, states)
            rows, target = _rows(states, mask).float(), _rows(wanted[name], mask).float()
            width = (rows.shape[-1],)
            difference = functional.layer_norm(rows, width) - functional.layer_norm(target, width)
            total = total + difference.square().mean(-1).sum()
            tokens += len(rows)
        return total, tokens

    def _outputs(self, model: nn.Module, batch: Inputs) -> tuple[dict[str, Tensor], Tensor | None]:
        """The hidden states after the last blocks, by the blocks' names, and logits of a vocabulary."""
        found: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            found[name] = first_of(output)

        with ExitStack() as hooks:
            for name in self._last:
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_hook(lambda *a, name=name: keep(name, a[-1])).remove)
            logits = getattr(model(**batch, **self._options), "logits", None)
        if not self._speaks or not isinstance(logits, Tensor) or logits.shape[:-1] != found[self._last[-1]].shape[:-1]:
            return found, None
        return found, logits


def _last_blocks(model: nn.Module, names: list[str]) -> list[str]:
    """The last block of each tower, by name: of the decoder, if there is one. Stages in one list are one tower."""
    decoder = decoder_of(model)
    place = next((name for name, module in model.named_modules() if module is decoder), None)
    inside = [name for name in names if place is not None and name.startswith(f"{place}.")]
    towers: dict[str, str] = {}
    for name in inside or names:
        parts = name.split(".")
        first = next(i for i, part in enumerate(parts) if part.isdecimal())
        towers[".".join(parts[:first])] = name
    return [*towers.values()]


def _rows(states: Tensor, mask: Tensor | None) -> Tensor:
    """``[..., d]`` as ``[tokens, d]``, without padding."""
    rows = states.flatten(0, -2)
    return rows if mask is None else rows[mask]


class NetworkDistillation:
    """The distillation of a model in memory. To be made while the model is dense, which is copied.

    Args:
        model: the dense model, which will be pruned in place.
        blocks: its blocks, in the order of a forward.
        batches: arguments of the model's calls.
        settings: ``settings(tokens)`` of the training on so many tokens.
        grid: that the pruned weights will be on; None: there is none.
        observer: is told about progress.

    Raises:
        InputError: the batches are too few, or cannot be divided into samples.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        batches: list[Inputs],
        settings: Callable[[int], HealSettings],
        grid: Grid | None,
        observer: Observer,
    ) -> None:
        self._model, self._blocks, self._grid, self._observer = model, blocks, grid, observer
        tokens = _tokens_of(model, blocks, batches)
        self._settings = settings(tokens)
        self._steps = Steps.of(batches, tokens, self._settings)
        self._teacher = copy.deepcopy(model).requires_grad_(False)
        self._loss = Loss(model, blocks)

    def train_(self) -> Healing:
        """Trains the kept weights of the pruned model in place, with fixed masks. It ends with the weights that had the
        lowest loss on the samples that are held out; these may be those that it began with."""
        with ExitStack() as stack:
            stack.enter_context(run_mode(self._model, "distill"))
            stack.enter_context(frozen(self._model))
            for block in self._blocks:
                stack.enter_context(replaced_forward(block.module, with_products(block)))
            training = _Training(self._model, self._blocks, self._grid, self._loss, self._teacher, self._steps)
            try:
                healing = training.run_(self._settings, self._observer)
            finally:
                self._observer.close()
        self._observer.end(healing)
        return healing


class _Training:
    """The steps of a training."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        grid: Grid | None,
        loss: Loss,
        teacher: nn.Module,
        steps: Steps,
    ) -> None:
        self._model, self._blocks, self._loss, self._teacher, self._steps = model, blocks, loss, teacher, steps
        self._trainers = [BlockTrainer(block, None, grid) for block in blocks]

    def run_(self, settings: HealSettings, observer: Observer) -> Healing:
        begun, count = time.perf_counter(), settings.passes * len(self._steps.trained)
        first = best = self._measure()
        held = sum(self._loss(self._model, self._teacher, batch)[1] for batch in self._steps.measured)
        kept = [trainer.kept() for trainer in self._trainers]
        checks: list[tuple[int, float | None]] = [(0, finite(first))]
        losses: list[tuple[int, float | None]] = []
        backed_off: list[int] = []
        pending: list[float] = []
        tokens = 0
        observer.start(0, count, settings.step_tokens)
        observer.check(0, first)
        for step in range(1, count + 1):
            rate = settings.learning_rate * BACK_OFF ** len(backed_off) * schedule(step - 1, count)
            loss, seen = self._step_(order_of(len(self._steps.trained), step - 1, settings.seed), rate)
            tokens += seen
            pending.append(loss / max(1, seen))
            observer.step(step, pending[-1])
            if len(pending) >= max(1, count // POINTS) or step == count:
                losses.append((step, finite(sum(pending) / len(pending))))
                pending.clear()
            if step % math.ceil(count / CHECKS) and step != count:
                continue
            now = self._measure()
            checks.append((step, finite(now)))
            observer.check(step, now)
            if now < best:  # False for NaN
                best, kept = now, [trainer.kept() for trainer in self._trainers]
            elif not now <= first:
                backed_off.append(step)
                for trainer, values in zip(self._trainers, kept, strict=True):
                    trainer.restart_(values)
        for trainer, values, block in zip(self._trainers, kept, self._blocks, strict=True):
            trainer.put_(values)
            trainer.check(block)
        return Healing(
            settings=asdict(settings),
            tokens=tokens,
            steps=count,
            parts=1,
            held_out=held,
            loss_before=first,
            loss_after=best,
            zeros=sum(trainer.pruned for trainer in self._trainers),
            seconds=time.perf_counter() - begun,
            losses=losses,
            checks=checks,
            backed_off=backed_off,
        )

    def _measure(self) -> float:
        """The mean loss of the tokens that are held out."""
        with torch.no_grad():
            found = [self._loss(self._model, self._teacher, batch) for batch in self._steps.measured]
        return sum(float(loss) for loss, _ in found) / max(1, sum(count for _, count in found))

    def _step_(self, index: int, rate: float) -> tuple[float, int]:
        """One step of training; the loss before it, summed over tokens, and their number."""
        with ExitStack() as contexts:
            for trainer in self._trainers:
                contexts.enter_context(trainer.gradients())
            with torch.enable_grad():
                loss, tokens = self._loss(self._model, self._teacher, self._steps.batches[index])
                weights = [weight for trainer in self._trainers for weight in trainer.weights.values()]
                gradients = iter(torch.autograd.grad(loss, weights, allow_unused=True))
        for trainer in self._trainers:
            trainer.take({child: next(gradients) for child in trainer.weights})
            trainer.step_(rate)
        return float(loss.detach()), tokens


@torch.no_grad()
def _tokens_of(model: nn.Module, blocks: list[Block], batches: list[Inputs]) -> int:
    """How many tokens go through the last block of the first tower, padding included, by a call with one sample."""
    first = {name: value[:1] for name, value in batches[0].items()}
    seen: list[int] = []
    block = model.get_submodule(_last_blocks(model, [block.name for block in blocks])[0])
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(token_count(module, first_of(output)))
    )
    try:
        model(**first, **plain_call(model))
    finally:
        handle.remove()
    return max(1, sum(seen)) * sum(_samples(batch) for batch in batches)
