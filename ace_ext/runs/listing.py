"""``ace-prune plan --list``: every weight of a model's blocks by name, and whether it is pruned."""

import json
from collections.abc import Sequence

from ace_ext.dense_weights import DenseWeight
from ace_ext.models.blocks import stay_dense
from ace_ext.runs.options import RunRequest
from ace_ext.runs.shapes_only import open_for_plan

PRUNED = "pruned"


def list_weights(request: RunRequest) -> list[DenseWeight]:
    """The matrices that a run would prune, with :data:`PRUNED` as the reason, and then those that stay dense. No weight
    is read.

    Raises:
        InputError: the model cannot be opened, or has nothing to prune.
    """
    source = open_for_plan(request)
    found = [
        DenseWeight(block.full_name(child), (linear.out_features, linear.in_features), PRUNED)
        for block in source.blocks
        for child, linear in block.linears.items()
    ]
    return found + stay_dense(source.model, source.blocks)


def as_text(weights: Sequence[DenseWeight]) -> str:
    """A line for each: name, shape, and what happens to it."""
    width = max((len(weight.name) for weight in weights), default=0)
    shapes = ["x".join(map(str, weight.shape)) for weight in weights]
    wide = max(map(len, shapes), default=0)
    return "\n".join(
        f"{weight.name:<{width}}  {shape:>{wide}}  {_fate(weight)}"
        for weight, shape in zip(weights, shapes, strict=True)
    )


def as_json(weights: Sequence[DenseWeight]) -> str:
    """The same as JSON."""
    return json.dumps([vars(weight) for weight in weights], indent=1)


def _fate(weight: DenseWeight) -> str:
    return PRUNED if weight.reason == PRUNED else f"dense: {weight.reason}"
