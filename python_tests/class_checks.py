"""What became of a class that was built small and pruned, and the checks of its weights."""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import every_class
import other_classes
import pytest
import torch
from torch import nn

from ace_ext.models.blocks import find_blocks
from ace_ext.pruning.groups import keep_count
from ace_ext.records import PruneReport

OK, PARTLY, REFUSED, NOT_BUILT = "ok", "partly dense", "refused", "not built"


@dataclass
class Row:
    """What became of one class."""

    fate: str
    words: str = ""
    dense: float = 0.0
    """The share of the weights that stay dense, of those that are matrices and neither embedding nor head."""
    report: PruneReport | None = None


Made = TypeVar("Made")


def built(make: Callable[[], Made], must: bool) -> Made:
    """What ``make`` builds for a class. A class may need more than a small configuration: its test is then skipped,
    unless it ``must`` be built."""
    try:
        return make()
    except Exception as error:
        if must:
            raise
        pytest.skip(f"not built: {error!r}")


def cases_of(always: Collection[str]) -> list[Any]:
    """Every causal-LM class and every other one, as ``(kind, module that builds it)``; at night but for ``always``."""
    causal = [kind for kind in every_class.model_types() if kind not in every_class.NOT_SMALL]
    assert {*causal, *other_classes.classes()} >= set(always)
    return [
        pytest.param(kind, classes, id=f"{kind}-{name}", marks=[] if kind in always else [pytest.mark.nightly])
        for name, classes, kinds in (("causal", every_class, causal), ("other", other_classes, other_classes.classes()))
        for kind in kinds
    ]


def inputs_of(model: nn.Module, classes: ModuleType) -> dict[str, torch.Tensor]:
    """A batch for a model of :func:`cases_of`."""
    if classes is other_classes:
        return other_classes.inputs_of(model)
    random = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(8, every_class.VOCABULARY - 4, (6, 16), generator=random)}


def calibration_of(inputs: dict[str, torch.Tensor], classes: ModuleType) -> Any:
    """The same as ``prune_model`` takes it."""
    return inputs["input_ids"] if classes is every_class else [inputs]


def check_weights(model: nn.Module, before: dict[str, torch.Tensor], report: PruneReport) -> None:
    """Every matrix keeps k of each row, with their values; nothing else changes; what stays dense is listed."""
    blocks = {block.name: block for block in find_blocks(model, max_dense=1.0)}
    listed = {weight.name for weight in report.dense}
    changed = {name: parameter != before[name] for name, parameter in model.named_parameters()}
    pruned = set()
    for matrix in report.matrices:
        name = next(name for name in blocks if matrix.name.startswith(f"{name}."))
        weight = blocks[name].linears[matrix.name.removeprefix(f"{name}.")].weight
        rows, cols = weight.shape
        assert matrix.shape == (rows, cols)
        assert ((weight != 0).sum(dim=1) == keep_count(cols, 0.5)).all(), matrix.name
        pruned.add(weight.data_ptr())
    for name, parameter in model.named_parameters():
        assert not parameter[changed[name]].any(), f"{name}: survivors are exact"
    held = {h.tensor.data_ptr() for block in blocks.values() for h in block.fused}
    ends = {id(parameter) for end in ends_of(model) for parameter in end.parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in pruned | held or id(parameter) in ends | embeddings:
            continue
        assert not changed[name].any(), f"{name}: was not to be pruned"
        silent = parameter.dim() > 1 and name not in listed and not name.endswith("bias")
        assert not silent, f"{name} {list(parameter.shape)}: stays dense and is not listed"


def ends_of(model: nn.Module) -> list[nn.Module]:
    """The input embeddings and the head, of a model that has them."""
    found = []
    for end in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # of images and sound
            found.append(end())
    return [end for end in found if isinstance(end, nn.Module)]  # Perceiver has a parameter there


def check_routers(model: nn.Module, report: PruneReport) -> None:
    """No matrix that is named like one that chooses experts, and that is not as wide as a gate of an MLP, is pruned."""
    for matrix in report.matrices:
        last = matrix.name.rpartition(".")[2]
        assert "router" not in matrix.name, matrix.name
        assert last not in ("wg", "shared_expert_gate"), matrix.name
        assert last != "gate" or matrix.shape[0] > 8, matrix.name
