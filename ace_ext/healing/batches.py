"""The text of a distillation, in batches of one gradient step each, and the hidden states of these batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.data.requests import check_positions, check_tokens
from ace_ext.errors import InputError
from ace_ext.healing.pinned import PinnedBlocks
from ace_ext.healing.settings import HealSettings
from ace_ext.models.block_store import BlockSource
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import BlockCall, capture_calls, first_states, run_block
from ace_ext.models.trial import try_walk

SHARED = 16
"""Two windows overlap if they have this number of consecutive tokens in common."""


def windows_needed(tokens: int, seqlen: int, settings: HealSettings) -> int:
    """How many windows a text needs so that all passes over it have ``tokens`` tokens, rounded up to whole steps. The
    windows that are held out are included."""
    rows = max(1, settings.step_tokens // seqlen)
    trained = rows * math.ceil(tokens / (settings.passes * rows * seqlen))
    return trained + min(settings.held_out, max(1, trained // 3))


def check_passes(tokens: int, seqlen: int, settings: HealSettings) -> None:
    """Checks that all passes, of at least one step each, fit in a budget of ``tokens``. One pass always does.

    Raises:
        InputError: they do not.
    """
    step = max(1, settings.step_tokens // seqlen) * seqlen
    if settings.passes > 1 and settings.passes * step > tokens:
        raise InputError(
            f"passes must be at most {max(1, tokens // step)} for {tokens:,} tokens: each takes at least one step of "
            f"{step:,} tokens (got {settings.passes}); give more tokens or minutes, or a smaller step-tokens"
        )


def windows_within(tokens: int, seqlen: int, settings: HealSettings) -> int:
    """:func:`windows_needed` for a budget that a user gave.

    Raises:
        InputError: as :func:`check_passes`.
    """
    check_passes(tokens, seqlen, settings)
    return windows_needed(tokens, seqlen, settings)


def held_windows(windows: int, settings: HealSettings) -> int:
    """How many of all windows are held out."""
    return min(settings.held_out, max(1, windows // 4))


def order_of(batches: int, step: int, seed: int) -> int:
    """Which of so many batches a step trains on, counted from 0: each pass has a different order."""
    done, place = divmod(step, batches)
    random = torch.Generator().manual_seed(seed + done)
    return int(torch.randperm(batches, generator=random)[place])


def check_windows(tokens: Tensor) -> None:
    """Raises :class:`ace_ext.InputError` unless ``tokens [nsamples, seqlen]`` are at least two windows of at least two
    tokens."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens must be a tensor [nsamples, seqlen] (got {type(tokens).__name__})")
    if tokens.dim() != 2 or len(tokens) < 2 or tokens.shape[1] < 2:
        raise InputError(
            f"tokens must be at least two windows [nsamples, seqlen] of two tokens: one to train on, one to measure on "
            f"(got shape {list(tokens.shape)})"
        )


def check_text(model: nn.Module, tokens: Tensor) -> None:
    """Raises :class:`ace_ext.InputError` for tokens on which a model cannot be trained: no windows, unknown ids, or
    windows with more tokens than the model has positions."""
    check_windows(tokens)
    check_tokens(model, tokens)
    check_positions(model, tokens.shape[1])


@dataclass(frozen=True)
class Batches:
    """Windows of text in batches; the last ``held_out`` batches are only measured on."""

    tokens: list[Tensor]  # each int64 [rows, seqlen]
    held_out: int

    @classmethod
    def of(cls, tokens: Tensor, settings: HealSettings) -> "Batches":
        """Divides ``[nsamples, seqlen]`` into batches. The last windows are held out. Windows that share ``SHARED``
        tokens in a row with one of these are left out, so that no held-out text is trained on.

        Raises:
            InputError: not two dimensions, fewer than two windows, or nothing left to train on.
        """
        check_windows(tokens)
        rows = max(1, settings.step_tokens // tokens.shape[1])
        held = held_windows(len(tokens), settings)
        trained, measured = torch.split(tokens, [len(tokens) - held, held])
        trained = trained[~_sharing(trained, measured)]
        if not len(trained):
            raise InputError(
                f"tokens: each of the {len(tokens) - held} windows shares text with one of the {held} that are held "
                f"out, so none is left to train on; give more text, or shorter windows"
            )
        held_out = torch.split(measured, rows)
        return cls([*torch.split(trained, rows), *held_out], len(held_out))

    @property
    def trained(self) -> range:
        """The batches to train on."""
        return range(len(self.tokens) - self.held_out)

    @property
    def measured(self) -> range:
        """The batches that are held out."""
        return range(len(self.trained), len(self.tokens))

    def order(self, step: int, seed: int) -> int:
        """The batch of a step, counted from 0: each pass over the text has a different order."""
        return order_of(len(self.trained), step, seed)


@dataclass(frozen=True)
class Placement:
    """Where hidden states are kept."""

    folder: Path | None = None
    """A folder for their files; None: in memory only."""
    resident: bool = True
    """Whether they stay in memory, also with a folder."""
    device: torch.device | None = None
    """Where blocks are run; None: the model's device."""


def enter(
    model: nn.Module,
    store: BlockSource,
    tokens: list[Tensor],
    place: Placement,
    name: str,
    earlier: HiddenStates | None = None,
) -> tuple[list[BlockCall], HiddenStates]:
    """The blocks' other arguments for each batch, and the states that enter the first block.

    Args:
        model: the model that the blocks belong to.
        store: its blocks.
        tokens: the batches.
        place: where the states are kept.
        name: the name of their files.
        earlier: states of an earlier run. If given, they are returned.

    Raises:
        InputError: the model cannot be walked block by block.
    """
    calls: list[BlockCall] = []

    def captured() -> Iterator[BlockCall]:
        for call in capture_calls(model, store.blocks, ({"input_ids": batch.to(device)} for batch in tokens)):
            if calls:
                call.others = _shared(call.others, calls[0].others)
            yield call

    device = place.device or next(model.parameters()).device
    first = {"input_ids": tokens[0].to(device)}
    reason = None if earlier is not None else try_walk(model, store, first).reason
    if reason is not None:
        raise InputError(f"this model cannot be distilled, which goes block by block: {reason}")
    with store.entrance(model):
        states = first_states(captured(), calls)
        if earlier is None:
            return calls, HiddenStates(states, place.folder, place.resident, name, device)
        for _ in states:
            pass
    return calls, earlier


@torch.no_grad()
def advance(store: BlockSource | PinnedBlocks, index: int, calls: list[BlockCall], states: HiddenStates) -> None:
    """Runs every batch through a block: its outputs become the states."""
    with store.loaded(index) as block:
        for i, call in enumerate(calls):
            states.put(i, run_block(block, states[i], call.others[index]))
    states.commit()


def _shared(value: Any, known: Any) -> Any:
    """``value``, with each tensor that equals the one of ``known`` replaced by it. Rotary embeddings and masks that all
    batches have in common are thus stored once."""
    if isinstance(value, Tensor):
        same = isinstance(known, Tensor) and value.dtype == known.dtype and torch.equal(value, known)
        return known if same else value
    if isinstance(value, tuple | list) and isinstance(known, tuple | list) and len(value) == len(known):
        return type(value)(_shared(one, other) for one, other in zip(value, known, strict=True))
    if isinstance(value, dict) and isinstance(known, dict):
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    return value


def _sharing(windows: Tensor, others: Tensor) -> Tensor:
    """``[n]`` bool: which of ``windows [n, seqlen]`` share ``SHARED`` tokens in a row with one of ``others``."""
    length = min(SHARED, windows.shape[1])
    factors = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0)) | 1

    def runs(tokens: Tensor) -> Tensor:
        """A 64-bit hash of each run of ``length`` tokens, ``[n, seqlen - length + 1]``."""
        count = tokens.shape[1] - length + 1
        return sum((tokens[:, i : i + count] * factors[i] for i in range(length)), torch.zeros(()).long())

    return torch.isin(runs(windows), runs(others)).any(1)


def rebatched(states: HiddenStates, tokens: list[Tensor]) -> Iterator[Tensor]:
    """States of the same samples in the batches of ``tokens``; ``[rows, seqlen, d_model]`` each."""
    rows = (row for i in range(len(states)) for row in torch.split(states[i], 1))
    for batch in tokens:
        yield torch.cat([next(rows) for _ in range(len(batch))])
