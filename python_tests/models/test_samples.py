"""The arguments of a block's call, divided into those of some samples."""

import every_class
import other_classes
import pytest
import torch
from tiny_models import make_model, make_tokens
from transformers import FalconConfig, FalconForCausalLM

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.samples import note_sample_shapes, of_samples, one_sample

HEADS = 4
TRAIN = PruneConfig("wanda + quantize(bits=4) + train(epochs=2, step_tokens=16)", 0.5)


def falcon():
    """With biases of attention that are those of each sample's heads."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return FalconForCausalLM(FalconConfig(**size, alibi=True, multi_query=False)).eval()


MODELS = {
    "llama": lambda: make_model("llama"),
    "gemma3": lambda: make_model("gemma3"),
    "bloom": lambda: every_class.build("bloom").eval(),
    "mpt": lambda: every_class.build("mpt").eval(),
    "falcon": falcon,
}
"""Bloom's and Falcon's biases of attention are ``[samples * heads, 1, seqlen]``, MPT's ``[heads, 1, seqlen]``."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_batch_give_what_the_batch_gives(name, padded):
    """There are as many samples as heads, so a shape does not tell them apart."""
    model, batch = MODELS[name](), {"input_ids": make_tokens(HEADS)}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, :5] = 0
    blocks = find_blocks(model)
    (call,) = capture_calls(model, blocks, [batch])
    note_sample_shapes([call], call.hidden.shape, capture_calls(model, blocks, [one_sample(batch)]))
    others, shapes = call.others[1], call.sample_shapes[1]
    with torch.no_grad():
        whole = run_block(blocks[1], call.hidden, others)
        parts = [slice(0, 1), slice(1, HEADS)]
        found = [run_block(blocks[1], call.hidden[part], of_samples(others, HEADS, part, shapes)) for part in parts]
    torch.testing.assert_close(torch.cat(found), whole)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_blocks_are_trained(name):
    report = prune_model(MODELS[name](), make_tokens(HEADS), TRAIN)
    losses = [(block.tuning.loss_before, block.tuning.loss_after) for block in report.blocks]
    assert all(after < before for before, after in losses)


def test_models_whose_hidden_states_have_the_tokens_first_are_refused():
    model = other_classes.build("fsmt").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="first dimension is that of the tokens; leave out train"):
        prune_model(model, [other_classes.inputs_of(model)], TRAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
