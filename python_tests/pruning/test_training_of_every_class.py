"""Every class: ``train`` gets each block's inputs in the pruned model so far, and the dense model's outputs as targets.

pytest -s -m nightly python_tests/pruning/test_training_of_every_class.py
"""

import copy

import pytest
import torch
from class_checks import built, calibration_of, cases_of, inputs_of

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.models._transformers import plain_call
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import first_of, take_hidden
from ace_ext.pruning.stages import train

ALWAYS = {"gemma4_text", "convnext", "cvt", "hiera"}
"""Blocks that share keys and values, states ``[batch, channels, height, width]``, and a block that joins tokens."""
METHOD = "collect(batch_tokens=32) + wanda + train(epochs=1, step_tokens=16)"


def seen_in(model, inputs):
    """By block: its hidden states and its output in a forward of the model."""
    given, outputs = {}, {}
    for block in find_blocks(model, max_dense=1.0):

        def note(_, args, kwargs, output, name=block.name):
            given[name], outputs[name] = take_hidden(args, kwargs)[0].clone(), first_of(output).clone()

        block.module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, **plain_call(model))
    return given, outputs


@pytest.mark.parametrize(("kind", "classes"), cases_of(ALWAYS))
def test_inputs_and_targets(kind, classes, monkeypatch):
    dense = built(lambda: classes.build(kind), kind in ALWAYS).eval()
    model = copy.deepcopy(dense)
    inputs = built(lambda: inputs_of(model, classes), kind in ALWAYS)
    found, own = {}, train.train_block_

    def noted(block, states, targets, *rest, **named):
        found[block.name] = torch.cat([hidden for hidden, _ in states]), torch.cat(list(targets))
        return own(block, states, targets, *rest, **named)

    monkeypatch.setattr(train, "train_block_", noted)
    try:
        report = prune_model(model, calibration_of(inputs, classes), PruneConfig(METHOD, max_dense=0.9))
    except InputError as error:
        assert kind not in ALWAYS
        pytest.skip(f"refused: {error}")
    assert found.keys() == {block.name for block in report.blocks if block.tuning is not None}
    (given, _), (_, expected) = seen_in(model.eval(), inputs), seen_in(dense, inputs)
    for name, (states, target) in found.items():
        torch.testing.assert_close(states, given[name], rtol=1e-3, atol=1e-4 * float(given[name].abs().max()))
        torch.testing.assert_close(target, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
