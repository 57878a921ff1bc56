"""Tries whether a model can be walked block by block: the model calls each block once, in order, and each block reads
only the output of the one before. The trial uses a few tokens, or one batch with images. It runs before anything is
changed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.errors import InputError
from ace_ext.models._transformers import output_head
from ace_ext.models.block_lists import goes_beyond_text
from ace_ext.models.block_store import BlockSource
from ace_ext.models.blocks import Block
from ace_ext.models.call_errors import explained
from ace_ext.models.handed_on import Equality, compare_arguments, differ, passed_on, shared_dicts
from ace_ext.models.parts import Recording, called_whole, parts_of, tried_parts
from ace_ext.models.replay import (
    Arguments,
    BlockCall,
    capture_calls,
    first_of,
    replaced_forward,
    run_block,
    take_hidden,
)
from ace_ext.models.samples import one_sample
from ace_ext.models.token_masks import TokenMasks

TOKENS = 8
"""The number of tokens of the first sample that the trial uses."""
_READ_MORE = "its blocks read more than the output of the one before"


class _Done(Exception):
    """Ends a forward pass before the LM head. Never leaves this file."""


@torch.no_grad()
def try_walk(model: nn.Module, store: BlockSource, batch: dict[str, Tensor]) -> "Findings":
    """Tries a forward pass and a walk on a part of a batch. Reads each block once, and brings the blocks of ``store``
    into the order of their calls.

    Args:
        model: in evaluation mode.
        store: its blocks.
        batch: arguments of a call. A few tokens are used; the whole batch if it has inputs of another shape than
            ``input_ids [batch, seqlen]``, such as images.

    Raises:
        InputError: a text call reaches none of the blocks.
    """
    few = _part(batch)
    if goes_beyond_text(model, [block.name for block in store.blocks]):
        with explained(model, batch):
            return _try_parts(model, store, few)
    trial = _tried(model, store, few)
    if trial.reordered:  # the tokens that attention reads differ between blocks only if they are fewer than all
        trial = _tried(model, store, {name: value[:1] for name, value in batch.items()})
    reason = trial.verdict()
    trial.sort_blocks()
    return Findings(reason, trial.uses, trial.shares)


@torch.no_grad()
def try_later_batches(model: nn.Module, store: BlockSource, batches: Sequence[dict[str, Tensor]]) -> None:
    """Tries the batches of a model of several parts, whose later parts would else be called with them only after the
    earlier parts are pruned. Of batches with inputs of the same shapes one is tried, with one sample, unless integers
    go beyond those tried before.

    Args:
        model: in evaluation mode. :func:`try_walk` has tried the first batch.
        store: its blocks.
        batches: arguments of the calls.

    Raises:
        InputError: a batch does not suit the model.
    """
    shapes, limits = {_shapes(batches[0])}, _limits(batches[0])
    for batch in batches[1:]:
        beyond = _limits(batch)
        known = all(limits[name][0] <= low and high <= limits[name][1] for name, (low, high) in beyond.items())
        if known and _shapes(batch) in shapes:
            continue
        whole = not known or len({len(value) for value in batch.values()}) > 1
        with explained(model, batch):
            called_whole(model, store, batch if whole else one_sample(batch))
        shapes.add(_shapes(batch))
        if whole:
            for name, (low, high) in beyond.items():
                limits[name] = min(low, limits[name][0]), max(high, limits[name][1])


def _shapes(batch: dict[str, Tensor]) -> frozenset[object]:
    """The names, dtypes and shapes of a batch's inputs, of any number of samples."""
    most = max(map(len, batch.values()))
    return frozenset((name, value.dtype, value.shape[1:], len(value) / most) for name, value in batch.items())


def _limits(batch: dict[str, Tensor]) -> MutableMapping[str, tuple[float, float]]:
    """The least and the largest value of each input of integers, such as the ids of an embedding's rows."""
    found = defaultdict[str, tuple[float, float]](lambda: (float("inf"), float("-inf")))
    found |= {name: (int(v.min()), int(v.max())) for name, v in batch.items() if not v.is_floating_point()}
    return found


def _tried(model: nn.Module, store: BlockSource, few: dict[str, Tensor]) -> "_Trial":
    """A trial with a batch, after its forward."""
    with store.entrance(model):
        call = _captured(model, store, few)
    trial = _Trial(store, call)
    with ExitStack() as stack:
        for index, block in enumerate(store.blocks):
            stack.enter_context(replaced_forward(block.module, trial.forward_of(index, block.module.forward)))
        stack.enter_context(store.outside_loaded(model))  # on use: only one block is in memory at a time
        stack.enter_context(explained(model, few))
        _pass_through(model, few)
    return trial


def _part(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch to try. A batch with images is used as a whole: images belong to certain tokens, and may
    reach the blocks in other ways than text does."""
    if "input_ids" not in batch or any(value.shape != batch["input_ids"].shape for value in batch.values()):
        return batch
    return {name: value[:1, :TOKENS] for name, value in batch.items() if name != "attention_mask"}


@dataclass(frozen=True)
class Findings:
    """What :func:`try_walk` found."""

    reason: str | None
    """Why the model cannot be walked block by block, in words; None if it can."""
    uses: dict[str, Counter[str]]
    """How often each Linear was called, by the name of each block that was called."""

    shares: bool = False
    """Whether blocks also pass values on in a dict that is an argument of each, such as keys and values of
    attention."""
    parts: Sequence[range] = ()
    """The parts of a network that is no causal language model (:mod:`ace_ext.models.parts`), in the order of a
    forward."""

    def uncalled(self, block: Block) -> list[str]:
        """The Linears of a block that no text call uses. Experts are left out, because other text may use them."""
        uses = self.uses.get(block.name, Counter())
        return [child for child in block.linears if not uses[child] and not block.is_expert(child)]


def _try_parts(model: nn.Module, store: BlockSource, batch: dict[str, Tensor]) -> Findings:
    """:func:`try_walk` of a model with several lists of blocks."""
    recording = Recording(model, store, batch)
    parts, reason = parts_of(recording, store)
    if reason is None:
        TokenMasks(model, plain=False).check_used([store.blocks[part.start].name for part in parts], batch)
        reason = tried_parts(model, store, batch, recording, parts)
    shares = any(isinstance(value, MutableMapping) and bool(value) for value in recording.named)
    return Findings(reason, recording.uses, shares, parts)


def _captured(model: nn.Module, store: BlockSource, batch: dict[str, Tensor]) -> BlockCall | None:
    try:
        return next(capture_calls(model, store.blocks, [batch]))
    except Exception:  # a model without its blocks, or with another order of calls, can raise anything
        return None


class _Trial:
    """One forward pass of a model, in which each block is also called in the way of a walk."""

    def __init__(self, store: BlockSource, call: BlockCall | None) -> None:
        self._store, self._call = store, call
        self._hidden = None if call is None else call.hidden
        self.uses: dict[str, Counter[str]] = {}
        self._calls: list[str] = []
        self._output: Tensor | None = None
        self._error: Exception | None = None
        self._differs = False
        self.reordered = False
        """Whether blocks were called with the integers that a walk knows, in another order."""

    def forward_of(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that replaces ``original``, that of block ``index``."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._compare(index, args, kwargs)
            with self._store.loaded(index) as block:
                with block.products(), _counted(block, self.uses.setdefault(block.name, Counter())):
                    output = original(*args, **kwargs)
                if len(self._calls) == index and self._hidden is not None and self._call is not None:
                    with replaced_forward(block.module, original):
                        self._walk(index)
            self._calls.append(block.name)
            self._output = first_of(output)
            return output

        return forward

    def _compare(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares a call's arguments with those of a walk, which are known before the blocks before it have run."""
        if self._call is not None and len(self._calls) == index:
            self._note(compare_arguments(take_hidden(args, kwargs)[1], self._call.others[index]))

    def _note(self, found: Equality) -> None:
        self._differs |= found is Equality.NO
        self.reordered |= found is Equality.REORDERED

    def _walk(self, index: int) -> None:
        assert self._call is not None
        assert self._hidden is not None
        block = self._store.blocks[index]
        try:
            if not index:
                self._note(passed_on(block, self._call, self._hidden, index))
            self._hidden = run_block(block, self._hidden, self._call.others[index])
        except Exception as error:  # a block that lacks an input can raise anything
            self._error, self._hidden = error, None

    @property
    def shares(self) -> bool:
        """As :attr:`Findings.shares`: such a dict is empty before the walk."""
        return self._call is not None and any(map(bool, shared_dicts(self._call)))

    def sort_blocks(self) -> None:
        """Brings the blocks of the store into the order of their first calls, in which they are then pruned."""
        order = list(dict.fromkeys(self._calls))
        if len(order) == len(self._store.blocks):
            self._store.blocks.sort(key=lambda block: order.index(block.name))

    def verdict(self) -> str | None:
        """As :attr:`Findings.reason`."""
        names = [block.name for block in self._store.blocks]
        if self._calls != names:
            return _described(self._calls, names)
        if self._error is not None:
            return f"its blocks need more than the output of the one before ({type(self._error).__name__})"
        if self._hidden is None or self._output is None:
            return "it cannot run with its blocks left out"
        return _READ_MORE if self._differs or differ(self._hidden, self._output) else None


@contextmanager
def _counted(block: Block, uses: Counter[str]) -> Iterator[None]:
    """Within this context calls of the block's Linears are counted."""
    with ExitStack() as hooks:
        for child, linear in block.linears.items():
            handle = linear.register_forward_pre_hook(lambda *_, child=child: uses.update([child]))
            hooks.callback(handle.remove)
        yield


def calls_in(block: Block, hidden: Tensor, others: Arguments) -> Counter[str]:
    """How often a block calls each of its Linears; arguments as of :func:`ace_ext.models.replay.run_block`."""
    uses: Counter[str] = Counter()
    with _counted(block, uses):
        run_block(block, hidden, others)
    return uses


def _pass_through(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Calls the model up to its LM head."""

    def end(*_: Any, **__: Any) -> Any:
        raise _Done

    head = output_head(model)
    with ExitStack() as replaced:
        if head is not None:
            replaced.enter_context(replaced_forward(head, end))
        try:
            model(**batch, use_cache=False)
        except _Done:
            return


def _described(calls: list[str], names: list[str]) -> str:
    counts = Counter(calls)
    missing = [name for name in names if not counts[name]]
    if len(missing) == len(names):
        raise InputError(
            f"a call with text alone does not reach {names[0]} and later blocks; prune the model's language part"
        )
    if missing:
        return f"it does not call {missing[0]}"
    most = max(names, key=lambda name: counts[name])
    return f"it calls {most} {counts[most]} times" if counts[most] > 1 else "it calls its blocks in another order"
