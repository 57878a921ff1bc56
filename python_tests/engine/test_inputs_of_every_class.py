"""Every class: the masks of each block are those of its inputs in the whole model, with the blocks before it pruned.

    pytest -s -m nightly python_tests/engine/test_inputs_of_every_class.py

A block that gets more from the blocks before it than hidden states, such as a router's state, must not get what these
blocks gave before they were pruned.
"""

import copy

import pytest
import torch
from class_checks import built, calibration_of, cases_of, inputs_of

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.models._transformers import plain_call
from ace_ext.models.blocks import find_blocks

ALWAYS = {"glm_moe_dsa", "xlm", "zaya", "conditional_detr", "flaubert", "pegasus_x"}
"""Classes whose blocks are called in another order than they have in the model, or hand on more than hidden states."""
CONFIG = PruneConfig("collect(order=block) + wanda", max_dense=0.9)
ROUNDING = 1e-4
"""The largest relative distance to its row's last kept score at which a weight may be kept or not."""


def forward(model, inputs, hooks=()):
    """A forward with ``(module, hook before it)``."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    with torch.no_grad():
        model(**inputs, **plain_call(model))
    for handle in handles:
        handle.remove()


def order_of(model, blocks, inputs):
    """The names of the blocks in the order of their first calls."""
    called = {}
    forward(model, inputs, [(b.module, lambda *_, name=b.name: called.setdefault(name)) for b in blocks])
    return list(called)


def seen_by(block, model, inputs):
    """By Linear of a block that is called: its inputs ``[tokens, d_in]`` of all calls."""
    seen = {}

    def note(child):
        return lambda _, x: seen.setdefault(child, []).append(x[0].flatten(0, -2))

    with block.products():  # of matrices that no Linear of the model holds, such as an expert's, too
        forward(model, inputs, [(linear, note(child)) for child, linear in block.linears.items()])
    return {child: torch.cat(found) for child, found in seen.items()}


def off_by(weight, pruned, x):
    """How far from their row's last kept score are the weights that Wanda's definition decides otherwise."""
    score = weight.abs() * x.double().norm(dim=0).float()
    best = score.topk(score.shape[1] - score.shape[1] // 2, dim=1)
    kept = torch.zeros_like(score).scatter_(1, best.indices, 1.0).bool()
    distance = (score - best.values[:, -1:]).abs() / best.values[:, -1:].clamp_min(1e-12)
    return float(distance[kept != (pruned != 0)].amax()) if not torch.equal(kept, pruned != 0) else 0.0


@pytest.mark.parametrize(("kind", "classes"), cases_of(ALWAYS))
def test_masks_are_those_of_the_model_so_far(kind, classes):
    so_far = built(lambda: classes.build(kind), kind in ALWAYS).eval()  # first dense, then pruned block by block
    model = copy.deepcopy(so_far)
    inputs = built(lambda: inputs_of(model, classes), kind in ALWAYS)
    try:
        report = prune_model(
            model, calibration_of(inputs, classes), PruneConfig("collect(order=block) + wanda", max_dense=0.9)
        )
    except InputError as error:
        assert kind not in ALWAYS
        pytest.skip(f"refused: {error}")
    names = {matrix.name for matrix in report.matrices}
    blocks, pruned = ({b.name: b for b in find_blocks(m, max_dense=1.0)} for m in (so_far, model))
    checked = 0
    for name in order_of(so_far, blocks.values(), inputs):
        for child, x in seen_by(blocks[name], so_far, inputs).items():
            if f"{name}.{child}" in names and x.any():
                distance = off_by(blocks[name].linears[child].weight, pruned[name].linears[child].weight, x)
                assert distance < ROUNDING, f"{name}.{child}"
                checked += 1
        blocks[name].module.load_state_dict(pruned[name].module.state_dict())
    assert checked
