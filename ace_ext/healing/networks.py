"""Distillation of a network that is no causal language model: it is trained towards the outputs of the dense one.

Unlike :mod:`ace_ext.healing.distill` it works on whole forwards of a model in memory, beside a copy of the dense one,
since the blocks of such a network are no single chain.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.healing.batches import held_windows
from ace_ext.healing.context import HealContext
from ace_ext.healing.part import Part, healing_of, new_notes
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models._transformers import decoder_of, output_head, plain_call
from ace_ext.models.blocks import Block
from ace_ext.models.replay import first_of, replaced_forward, token_count, token_rows, with_products
from ace_ext.models.run_mode import frozen, run_mode
from ace_ext.models.samples import one_sample
from ace_ext.models.token_masks import TokenMasks
from ace_ext.pruning.stages.distill import NETWORK_RATE
from ace_ext.records import KL, STATES, Healing

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
        self.name = STATES
        """What it is, for a report; known after the first call."""

    def __call__(self, student: nn.Module, teacher: nn.Module, batch: Inputs) -> tuple[Tensor, int]:
        """The loss, summed over tokens, and their number."""
        with torch.no_grad():
            wanted, spoken = self._outputs(teacher, batch)
        found, said = self._outputs(student, batch)
        if spoken is not None and said is not None:
            self.name = KL
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

        def keep(name: str, module: nn.Module, output: Any) -> None:
            found[name] = token_rows(module, first_of(output))

        with ExitStack() as hooks:
            for name in self._last:
                module = model.get_submodule(name)
                hooks.callback(
                    module.register_forward_hook(lambda module, _, output, name=name: keep(name, module, output)).remove
                )
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
    """The distillation of a model in memory. Without a ``teacher`` it is to be made while the model is dense, which is
    copied.

    Args:
        model: the dense model, which will be pruned in place; with a ``teacher`` the pruned one.
        blocks: its blocks, in the order of a forward.
        batches: arguments of the model's calls.
        settings: ``settings(tokens)`` of the training on so many tokens.
        grid: that the pruned weights will be on; None: there is none.
        context: its journal and its observer are used.
        teacher: the dense model.

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
        context: HealContext,
        teacher: nn.Module | None = None,
    ) -> None:
        self._model, self._blocks, self._grid, self._context = model, blocks, grid, context
        tokens = _tokens_of(model, blocks, batches)
        found = settings(tokens)
        self._settings = replace(found, learning_rate=found.learning_rate or NETWORK_RATE)
        self._steps = Steps.of(batches, tokens, self._settings)
        self._teacher = (copy.deepcopy(model) if teacher is None else teacher).eval().requires_grad_(False)
        self._loss = Loss(model, blocks)

    @property
    def steps(self) -> int:
        """How many steps all passes take."""
        return self._settings.passes * len(self._steps.trained)

    def train_(self) -> Healing:
        """Trains the kept weights of the pruned model in place, with fixed masks. It ends with the weights that had the
        lowest loss on the samples that are held out; these may be those that it began with."""
        context, count = self._context, self.steps
        context.journal.notes.update({**new_notes(), **context.journal.notes})
        with ExitStack() as stack:
            stack.enter_context(run_mode(self._model, "distill"))
            stack.enter_context(frozen(self._model))
            for block in self._blocks:
                stack.enter_context(replaced_forward(block.module, with_products(block)))
            trainers = {index: BlockTrainer(block, None, self._grid) for index, block in enumerate(self._blocks)}
            student = _Student(self._model, self._teacher, self._loss, self._steps, list(trainers.values()))
            context.observer.start(context.journal.notes["step"], count, self._settings.step_tokens)
            try:
                if context.journal.notes["part"] == 0:
                    Part(student, self._blocks, range(count), trainers, count, self._settings, context).train_()
                if not student.held_out:  # a resumed run may have had no step left
                    student.measure()
            finally:
                context.observer.close()
        healing = healing_of(context.journal.notes, self._settings, 1, student.held_out, self._loss.name)
        context.observer.end(healing)
        return healing


class _Student:
    """A whole network that is trained: a :class:`ace_ext.healing.part.Trainee`."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, loss: Loss, steps: Steps, trainers: list[BlockTrainer]
    ) -> None:
        self._model, self._teacher, self._loss, self._steps, self._trainers = model, teacher, loss, steps, trainers
        self.held_out = 0
        """Tokens that are held out; known after the first measurement."""

    @property
    def batches(self) -> int:
        """The number of batches to train on."""
        return len(self._steps.trained)

    def measure(self) -> float:
        """The mean loss of the tokens that are held out."""
        found = [self._loss(self._model, self._teacher, batch) for batch in self._steps.measured]
        self.held_out = sum(tokens for _, tokens in found)
        return sum(float(loss) for loss, _ in found) / max(1, self.held_out)

    def step_(self, batch: int, learning_rate: float) -> tuple[float, int]:
        """One step of training; the loss before it, summed over tokens, and their number."""
        with torch.enable_grad():
            loss, tokens = self._loss(self._model, self._teacher, self._steps.batches[batch])
            weights = [weight for trainer in self._trainers for weight in trainer.weights.values()]
            gradients = iter(torch.autograd.grad(loss, weights, allow_unused=True))
        for trainer in self._trainers:
            trainer.take({child: next(gradients) for child in trainer.weights})
            trainer.step_(learning_rate)
        return float(loss.detach()), tokens


@torch.no_grad()
def _tokens_of(model: nn.Module, blocks: list[Block], batches: list[Inputs]) -> int:
    """How many tokens go through the last block of the first tower, padding included, by a call with one sample."""
    first = one_sample(batches[0])
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
