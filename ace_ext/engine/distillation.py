"""The update ``distill``: the dense model is run before the walk over its blocks, and the pruned one is trained towards
its predictions after it."""

from torch import Tensor, nn

from ace_ext.data.requests import check_predicts
from ace_ext.engine.context import RunContext
from ace_ext.errors import InputError
from ace_ext.healing.batches import Batches, Placement
from ace_ext.healing.context import HealContext
from ace_ext.healing.distill import distill_
from ace_ext.healing.settings import HealSettings
from ace_ext.healing.teacher import teacher_states
from ace_ext.models.block_store import BlockSource
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.solvers.distill import DistillOptions
from ace_ext.records import Healing


def heal_settings(config: PruneConfig) -> HealSettings:
    """How ``config`` distills; its ``update`` must name it."""
    solver = config.solver.model_solver
    assert solver is not None
    options = config.solver.options_for(solver)
    assert isinstance(options, DistillOptions)
    return HealSettings(passes=options.distill_passes, learning_rate=options.distill_lr)


class Distillation:
    """The distillation of a model in memory on its calibration tokens. To be made while the model is dense.

    Args:
        model: the dense model, which will be pruned in place.
        store: its blocks.
        tokens: the calibration samples, int64 ``[nsamples, seqlen]``.
        config: its ``update`` names ``distill``.
        context: of the run.

    Raises:
        InputError: the samples are not one tensor, or too few to hold some back.
    """

    def __init__(
        self, model: nn.Module, store: BlockSource, tokens: object, config: PruneConfig, context: RunContext
    ) -> None:
        if not isinstance(tokens, Tensor):
            raise InputError(
                "update distill trains on windows of text without padding: give calibration as one tensor "
                f"[nsamples, seqlen] (got {type(tokens).__name__})"
            )
        check_predicts(model, "update distill trains on its predictions: leave it out")
        self._model, self._tokens, self._settings = model, tokens.to("cpu"), heal_settings(config)
        batches = Batches.of(self._tokens, self._settings)
        place, observer = Placement(device=context.device), context.observer.healing
        self._context = HealContext(blocks=store, place=place, observer=observer)
        try:
            self._teacher = teacher_states(model, store, batches.tokens, place, self._context.journal, observer)
        finally:
            observer.close()

    def train_(self) -> Healing:
        """Trains the pruned model in place."""
        return distill_(self._model, self._teacher, self._tokens, self._settings, context=self._context)
