"""The stage ``distill``: the dense model is run before the walk over its blocks, and the pruned one is trained towards
its predictions after it."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ace_ext.data.requests import check_predicts
from ace_ext.engine.context import RunContext
from ace_ext.errors import InputError
from ace_ext.healing.batches import Batches, Placement, check_text, held_windows, windows_needed
from ace_ext.healing.context import HealContext
from ace_ext.healing.distill import distill_
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.teacher import teacher_states
from ace_ext.models.block_store import BlockSource, ResidentBlocks
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.stages import TrainModel
from ace_ext.records import Healing

if TYPE_CHECKING:  # at run time only such networks load it
    from ace_ext.healing.networks import NetworkDistillation

TEXT_SEED = 2**20
"""By this bit the seed of the windows that are distilled on differs from that of the calibration samples."""

PASSES, NETWORK_PASSES = 6, 12
"""Over a text that is shorter than the stage's ``tokens`` at most so many passes are made: by causal language models,
and by other networks."""
DRAWN = 98304
"""At most so many tokens of text are drawn for other networks; further passes are made over them."""


def heal_settings(config: PruneConfig, windows: int, seqlen: int) -> HealSettings:
    """How ``config``, whose method distills, trains on windows of text, held-out ones included."""
    stage = _stage(config)
    settings = HealSettings(learning_rate=stage.learning_rate)
    trained = windows - held_windows(windows, settings)
    return replace(settings, passes=min(PASSES, math.ceil(stage.budget(causal=True) / (trained * seqlen))))


def distill_draw(config: PruneConfig, seqlen: int, seed: int, causal: bool = True) -> tuple[int, int]:
    """How many windows of text ``config`` trains on in one pass and holds back, and the seed that they are drawn with
    where ``seed`` draws the calibration samples. ``causal``: for a causal language model.

    The calibration samples are not among them, as pruning has fitted its mask and weights to these: the loss on such a
    window begins too low, at 0.32 in place of 0.54 for SmolLM2-135M at 50 %, and says little about other text.
    """
    tokens = _stage(config).budget(causal)
    return windows_needed(tokens if causal else min(tokens, DRAWN), seqlen, HealSettings()), seed ^ TEXT_SEED


def _stage(config: PruneConfig) -> TrainModel:
    assert config.method.distill is not None  # callers ask only for such methods
    return config.method.distill


def network_distillation(
    model: nn.Module, store: BlockSource, batches: list[dict[str, Tensor]], config: PruneConfig, context: RunContext
) -> "NetworkDistillation":
    """The distillation of a network that is no causal language model, in memory and dense. ``batches``: arguments of
    its calls.

    Raises:
        InputError: as :class:`ace_ext.healing.networks.NetworkDistillation`; or the blocks are not in memory.
    """
    from ace_ext.healing.networks import NetworkDistillation  # imported here: most runs distil no such network

    if not isinstance(store, ResidentBlocks) or context.peers.size > 1:
        raise InputError(
            "distill of this kind of model needs it in the memory of one process: leave out --offload disk"
        )
    stage = _stage(config)
    wanted, rate = stage.budget(causal=False), stage.learning_rate

    def settings(tokens: int) -> HealSettings:
        return HealSettings(learning_rate=rate, passes=min(NETWORK_PASSES, math.ceil(wanted / max(1, tokens))))

    grid = config.method.grid
    healing = HealContext(observer=context.observer.healing)
    return NetworkDistillation(model, store.blocks, batches, settings, grid, healing)


class Distillation:
    """The distillation of a model in memory. To be made while the model is dense.

    Args:
        model: the dense model, which will be pruned in place.
        store: its blocks.
        tokens: the text, int64 ``[windows, seqlen]``.
        config: its method distills.
        context: of the run.

    Raises:
        InputError: the text is not one tensor of tokens that the model knows, has more positions than the model, or is
            too short to hold some back.
    """

    def __init__(
        self, model: nn.Module, store: BlockSource, tokens: object, config: PruneConfig, context: RunContext
    ) -> None:
        if not isinstance(tokens, Tensor):
            raise InputError(
                "distill trains on windows of text without padding: give distill_text, or calibration as one "
                f"tensor [nsamples, seqlen] (got {type(tokens).__name__})"
            )
        check_predicts(model, "distill trains on its predictions: leave it out")
        check_text(model, tokens)
        self._model, self._settings = model, heal_settings(config, *tokens.shape)
        self._grid = config.method.grid
        self._tokens = tokens.to("cpu", torch.long)
        batches = Batches.of(self._tokens, self._settings)
        place, observer = Placement(device=context.device), context.observer.healing
        self._context = HealContext(blocks=store, place=place, observer=observer)
        try:
            self._teacher = teacher_states(model, store, batches.tokens, place, self._context.journal, observer)
        finally:
            observer.close()

    def follow(self, store: BlockSource) -> None:
        """From now on the model has other blocks: structures were removed."""
        self._context = replace(self._context, blocks=store)

    def train_(self) -> Healing:
        """Trains the pruned model in place."""
        return distill_(
            self._model, self._teacher, self._tokens, self._settings, grid=self._grid, context=self._context
        )
