"""Every causal-LM class: the losses that a distillation measures and the gradients of its steps are those of the whole
model, or the class is refused in words.

    pytest -s -m nightly python_tests/healing/test_gradients_of_every_class.py

The steps go block by block, backwards too, so they must know everything that a block reads from an earlier one.
"""

import copy

import every_class
import pytest
import torch
from class_checks import built
from healing.test_distill import mean_kl

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.healing import HealSettings, distill_
from ace_ext.healing.batches import Batches
from ace_ext.healing.context import HealContext
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.models.blocks import find_blocks

ALWAYS = {"gemma4_text", "gpt-sw3", "mixtral"}
"""Blocks that share keys and values, and matrices that are views of the model's parameters."""
CASES = [
    pytest.param(kind, marks=[] if kind in ALWAYS else [pytest.mark.nightly])
    for kind in every_class.model_types()
    if kind not in every_class.NOT_SMALL
]
ROUNDING = 5e-6
"""Of a gradient's norm. The gradient of each of 4,096 logits is a difference of probabilities of about 1/64. Float32
rounds their logarithms by 2^-22: 2.4e-7 in norm. MiniCPM-3's nearly equal logits, behind a norm, have 12 times that."""
SETTINGS = HealSettings(learning_rate=0.01, step_tokens=64, held_out=4)
TEXT = torch.randint(8, every_class.VOCABULARY - 4, (12, 16), generator=torch.Generator().manual_seed(1))


def gradients_of(student, teacher, tokens, weights):
    """The gradients of the divergence, summed over tokens, with respect to ``weights``: views of parameters."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    p, q = (model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1) for model in (teacher, student))
    found = torch.autograd.grad((p.exp() * (p - q)).sum(), parameters, allow_unused=True)
    by_storage = {p.untyped_storage().data_ptr(): (p, own) for p, own in zip(parameters, found, strict=True)}
    gradients = []
    for weight in weights:
        parameter, own = by_storage[weight.untyped_storage().data_ptr()]
        own = torch.zeros_like(parameter) if own is None else own.clone(memory_format=torch.contiguous_format)
        offset = weight.storage_offset() - parameter.storage_offset()
        gradients.append(own.as_strided(weight.shape, weight.stride(), offset) * (weight != 0))
    return gradients


def test_the_names_are_those_of_classes():
    assert {*every_class.model_types()} >= ALWAYS


@pytest.mark.parametrize("stored", [0, 99], ids=["run-again", "stored"])
@pytest.mark.parametrize("kind", CASES)
def test_losses_and_gradients(kind, stored, monkeypatch):
    teacher = built(lambda: every_class.build(kind), kind in ALWAYS).eval()
    model = copy.deepcopy(teacher)
    seen: list[dict] = []  # of blocks, from the last to the first
    backward = BlockTrainer.backward

    def noted(trainer, x, gradients):
        below = backward(trainer, x, gradients)
        seen.append({child: each.master.grad for child, each in trainer.trained.items()})
        return below

    monkeypatch.setattr(BlockTrainer, "backward", noted)
    try:
        prune_model(model, TEXT[:8], PruneConfig("wanda", sparsity=0.3))
        student = copy.deepcopy(model)
        healing = distill_(model, teacher, TEXT, SETTINGS, context=HealContext(graphs=stored))
    except InputError as error:
        assert kind not in ALWAYS
        pytest.skip(f"refused: {error}")
    batches = Batches.of(TEXT, SETTINGS)
    held_out = torch.cat([batches.tokens[i] for i in batches.measured])
    assert healing.loss_before == pytest.approx(mean_kl(student, teacher, held_out), rel=1e-4, abs=1e-7)
    assert healing.loss_after == pytest.approx(mean_kl(model, teacher, held_out), rel=1e-4, abs=1e-7)
    blocks = find_blocks(student)
    named = [(i, child, linear.weight) for i, block in enumerate(blocks) for child, linear in block.linears.items()]
    first = batches.tokens[batches.order(0, SETTINGS.seed)]
    expected = gradients_of(student, teacher, first, [weight for *_, weight in named])
    for (index, child, _), gradient in zip(named, expected, strict=True):
        own = seen[len(blocks) - 1 - index][child]  # None: the loss does not depend on it
        error = (gradient if own is None else own - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + ROUNDING, blocks[index].full_name(child)
