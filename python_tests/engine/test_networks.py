"""Networks that are no causal language models: inputs of any name, and several lists of blocks."""

import copy

import other_classes
import pytest
import torch
from engine.test_image_inputs import CASES as CASES_OF_IMAGES
from tiny_networks import NETWORKS, ids, make_inputs, make_network, values
from torch.nn.functional import layer_norm

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.engine import api
from ace_ext.engine.distillation import distill_draw
from ace_ext.models import trial
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.trial import Findings, try_walk

SEVERAL = {"swin": [1, 2], "whisper": [2, 2], "t5": [2, 2], "clip": [2, 2]}
"""How many blocks the parts of a model have."""


def linears_of(model):
    return {block.full_name(child): linear for block in find_blocks(model) for child, linear in block.linears.items()}


def weights_of(model):
    return {name: linear.weight.detach().clone() for name, linear in linears_of(model).items()}


def outputs_of(model, inputs):
    with torch.no_grad():
        return [x for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["fast", "collect(order=block, batch_tokens=64) + wanda", "balanced"])
def test_each_matrix_keeps_its_exact_half(name, method):
    model = make_network(name)
    report = prune_model(model, make_inputs(name), method=method, sparsity=0.5)
    assert {matrix.name for matrix in report.matrices} == set(linears_of(model))
    for own, linear in linears_of(model).items():
        kept = linear.weight.count_nonzero(dim=1)
        assert set(kept.tolist()) == {linear.in_features // 2}, own
    for output in outputs_of(model, make_inputs(name)[0]):
        assert bool(torch.isfinite(output).all())


def without_decoder(batch):
    return {"input_ids": batch["input_ids"]}


def fewer_decoded(batch):
    return batch | {"decoder_input_ids": batch["decoder_input_ids"][:-1]}


def shorter_sound(batch):
    return batch | {"input_features": batch["input_features"][..., :-2]}


LATER = {
    "nothing to decode": ("t5", without_decoder, r"needs decoder_input_ids"),
    "samples without a text": ("t5", fewer_decoded, r"do not suit T5.*input_ids \[3, 12\], decoder_input_ids \[2, 9\]"),
    "a short sound": ("whisper", shorter_sound, "calibration inputs do not suit Whisper"),
    "unknown ids": ("clip", lambda batch: batch | {"input_ids": batch["input_ids"] + 1000}, "do not suit CLIP"),
    "a large image": ("vit", lambda batch: {"pixel_values": torch.zeros(2, 3, 24, 24)}, "do not suit ViT"),
    "four colours": ("swin", lambda batch: {"pixel_values": torch.zeros(2, 4, 16, 16)}, "do not suit Swin"),
}


@pytest.mark.parametrize("case", LATER)
def test_a_later_batch_that_does_not_suit_the_model(case):
    """It is found before the earlier parts of the model are pruned."""
    name, change, message = LATER[case]
    first, second, *_ = make_inputs(name)
    model = make_network(name)
    before = weights_of(model)
    with pytest.raises(InputError, match=message):
        prune_model(model, [first, change(second)], method="wanda")
    assert all(torch.equal(weight, before[own]) for own, weight in weights_of(model).items())


def test_later_batches_are_tried_once_for_each_shape(monkeypatch):
    """Batches of other shapes with one sample, batches with unknown ids or unequal numbers of samples whole."""
    model = make_network("clip")
    batch = make_inputs("clip")[0] | {"input_ids": torch.full((3, 12), 5)}
    later = [
        batch,
        {name: value[:2] for name, value in batch.items()},
        batch | {"input_ids": batch["input_ids"][:, :9]},
        batch | {"input_ids": batch["input_ids"][:, :9].clone()},
        batch | {"input_ids": batch["input_ids"] + 3},
        batch | {"input_ids": batch["input_ids"] + 2},
        batch | {"input_ids": batch["input_ids"][:2]},
    ]
    called = []
    monkeypatch.setattr(trial, "called_whole", lambda model, store, found: called.append(found))
    trial.try_later_batches(model, ResidentBlocks(find_blocks(model)), [batch, *later])
    assert [list(found["input_ids"].shape) for found in called] == [[1, 9], [3, 12], [2, 12]]
    assert [int(found["input_ids"].max()) for found in called] == [5, 8, 5]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_is_walked_in_the_parts_that_its_forward_calls(name):
    model = make_network(name)
    store = ResidentBlocks(find_blocks(model))
    found = try_walk(model, store, make_inputs(name)[0])
    assert found.reason is None
    assert [len(part) for part in found.parts] == SEVERAL.get(name, [2])
    if name == "clip":  # the list of text comes first in the model
        assert store.blocks[0].name.startswith("vision_model.")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_walk_prunes_as_forwards_of_the_whole_model(name, monkeypatch):
    """Each block's statistics come from the model in which the blocks before it are pruned."""
    walked, by_forwards = make_network(name), make_network(name)
    method = "collect(order=block) + wanda"
    prune_model(walked, make_inputs(name), method=method, sparsity=0.5)

    def refused(*args):
        found = try_walk(*args)
        return Findings("asked by the test", found.uses, found.shares, found.parts)

    monkeypatch.setattr(api, "try_walk", refused)
    prune_model(by_forwards, make_inputs(name), method=method, sparsity=0.5)
    expected = weights_of(by_forwards)
    for own, weight in weights_of(walked).items():
        assert torch.equal(weight, expected[own]), own


@pytest.mark.parametrize("name", NETWORKS)
def test_sparsity_0_changes_no_output(name):
    model, inputs = make_network(name), make_inputs(name)
    before = outputs_of(model, inputs[0])
    prune_model(model, inputs, method="wanda", sparsity=0.0)
    for old, new in zip(before, outputs_of(model, inputs[0]), strict=True):
        assert torch.equal(old, new)


def padded(seqlen, real):
    mask = torch.zeros(3, seqlen, dtype=torch.long)
    mask[:, :real] = 1
    mask[0] = 1
    return mask


CASES = {
    "t5": ({"attention_mask": (12, 8), "decoder_attention_mask": (12, 5)}, {"decoder_input_ids": (12,)}),
    "clip": ({"attention_mask": (17, 8)}, {"input_ids": (17,)}),  # as many tokens as the image's
    "bert": ({"attention_mask": (12, 8)}, {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["wanda", "collect(order=block) + wanda"])
def test_padding_is_left_out(name, method):
    """The same weights come out, whatever stands in the place of padding."""
    masks, lengths = CASES[name]
    inputs = make_inputs(name, 1)[0] | {key: ids(*shape) for key, shape in lengths.items()}
    inputs |= {key: padded(*shape) for key, shape in masks.items()}
    found = []
    for filler in (3, 40):
        filled = dict(inputs)
        for key in masks:
            tokens = key.replace("attention_mask", "input_ids")
            filled[tokens] = inputs[tokens].masked_fill(inputs[key] == 0, filler)
        model = make_network(name)
        found.append((prune_model(model, [filled], method=method, sparsity=0.5), weights_of(model)))
    (report, first), (_, second) = found
    for own, weight in first.items():
        assert torch.equal(weight, second[own]), own
    real = {int(mask.sum()) for key, mask in inputs.items() if key in masks}
    real |= {3 * 17} if name == "clip" else set()
    assert {matrix.tokens for matrix in report.matrices} == real


def test_padding_of_sound_is_left_out():
    """The model says which frames its samples give."""
    model = make_network("wav2vec2")
    mask = torch.ones(3, 200, dtype=torch.long)
    mask[1, 100:] = 0
    report = prune_model(model, [{"input_values": values(200), "attention_mask": mask}], method="wanda")
    frames = [int(model._get_feat_extract_output_lengths(n)) for n in (200, 100, 200)]
    assert {matrix.tokens for matrix in report.matrices} == {sum(frames)}


def test_weights_of_all_parts_are_compared():
    model = make_network("t5")
    report = prune_model(model, make_inputs("t5"), method="wanda", sparsity=0.5, group="model")
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["t5", "swin"])
def test_sparsity_is_divided_among_all_parts(name):
    model = make_network(name)
    report = prune_model(model, make_inputs(name), method="allocate + wanda", sparsity=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


def test_half_precision_takes_the_inputs_of_a_processor():
    model = make_network("vit", dtype=torch.bfloat16)
    report = prune_model(model, make_inputs("vit"), sparsity=0.5)
    assert report.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["t5", "clip", "swin"])
def test_distillation_follows_the_outputs_of_the_dense_model(name):
    """Of a vocabulary, or of hidden states; which weights are zero stays."""
    model, inputs = make_network(name), make_inputs(name, 4)
    dense = outputs_of(make_network(name), inputs[0])[0]
    report = prune_model(model, inputs, method="wanda + distill(tokens=600, learning_rate=0.03)", sparsity=0.5)
    healing = report.healing
    assert healing.loss_after < 0.9 * healing.loss_before
    for linear in linears_of(model).values():
        assert set(linear.weight.count_nonzero(dim=1).tolist()) == {linear.in_features // 2}
        assert not linear.weight.requires_grad or linear.weight.grad is None
    plain = make_network(name)
    prune_model(plain, inputs, method="wanda", sparsity=0.5)
    errors = [(outputs_of(each, inputs[0])[0] - dense).norm() for each in (model, plain)]
    assert errors[0] < errors[1]


def test_the_loss_of_images_is_of_the_channels_of_each_token():
    """States ``[batch, channels, height, width]`` of ConvNeXt."""
    dense = other_classes.build("convnextv2")
    inputs = [other_classes.inputs_of(dense)] * 3
    model, states = copy.deepcopy(dense), []
    report = prune_model(model, inputs, method="wanda + distill(tokens=200)", sparsity=0.5)
    for each in (dense, model):
        last = find_blocks(each, max_dense=1.0)[-1].module
        last.register_forward_hook(lambda _, args, output: states.append(output.movedim(1, -1)))
        outputs_of(each, inputs[0])
    teaching, saying = (layer_norm(each, each.shape[-1:]) for each in states)
    assert teaching.shape[1:3] != teaching.shape[2:]
    loss = float((teaching - saying).square().mean())
    assert report.healing.loss_after == pytest.approx(loss, rel=1e-4)
    assert loss < report.healing.loss_before


def test_a_model_that_is_distilled_needs_two_samples():
    model, inputs = make_network("vit"), {"pixel_values": values(3, 16, 16)[:1]}
    before = weights_of(model)
    with pytest.raises(InputError, match="distill needs at least two samples"):
        prune_model(model, [inputs], method="wanda + distill", sparsity=0.5)
    assert all(torch.equal(weight, before[own]) for own, weight in weights_of(model).items())


def test_towers_that_stay_dense_are_pruned_on_request():
    """The tower of images, then the language model that sees its output."""
    make, inputs = CASES_OF_IMAGES["llava"]
    model = make()
    towers = ["vision_tower", "language_model"]
    report = prune_model(model, inputs(), method="wanda", sparsity=0.5, towers=towers)
    names = [matrix.name for matrix in report.matrices]
    assert "vision" in names[0]
    assert "language_model" in names[-1]
    for name in names:
        linear = model.get_submodule(name)
        assert set(linear.weight.count_nonzero(dim=1).tolist()) == {linear.in_features // 2}
    assert report.config["towers"] == towers
    plain = prune_model(make(), inputs(), method="wanda", sparsity=0.5)
    assert all("language_model" in matrix.name for matrix in plain.matrices)
    assert "towers" not in plain.config
    alone = prune_model(make(), inputs(), method="wanda", sparsity=0.5, towers="vision_tower")
    assert all("vision" in matrix.name for matrix in alone.matrices)
    with pytest.raises(InputError, match=r"towers 'ears' matches no list of blocks; the model has .*vision_tower"):
        prune_model(make(), inputs(), method="wanda", towers="ears")
    with pytest.raises(InputError, match=r"these inputs do not reach the blocks of .*vision_tower"):
        prune_model(make(), inputs()["input_ids"].clamp(max=50), method="wanda", towers=towers)


BAD = {
    "nothing to decode": ("t5", {"input_ids": ids(12)}, "needs? decoder_input_ids"),
    "an unknown name": ("vit", {"pixels": values(3, 16, 16)}, "calibration input pixels is none of ViT"),
    "another size": ("vit", {"pixel_values": values(3, 8, 8)}, r"do not suit ViT.*\(got pixel_values \[3, 3, 8, 8\]\)"),
    "not finite": ("vit", {"pixel_values": values(3, 16, 16) / 0}, "pixel_values must be finite"),
    "a tensor": ("vit", values(3, 16, 16), "reads pixel_values: give calibration as dicts"),
    "one tower": ("clip", {"input_ids": ids(12)}, "do not suit CLIPModel"),
    "ids of a decoder": (
        "whisper",
        {"input_features": values(8, 20), "decoder_input_ids": ids(9) + 60},
        "the model knows those from 0 to 63",
    ),
    "a mask of other length": (
        "t5",
        {"input_ids": ids(12), "attention_mask": padded(9, 5), "decoder_input_ids": ids(9)},
        "attention_mask must have the shape of input_ids",
    ),
    "a mask of pixels": (
        "wav2vec2",
        {"input_values": values(200), "attention_mask": padded(30, 7)},
        r"attention_mask must be \[batch, length\], as input_values \[3, 200\] \(got \[3, 30\]\)",
    ),
    "a mask of no part": (
        "clip",
        make_inputs("clip", 1)[0] | {"pixel_mask": padded(16, 7)},
        "pixel_mask is none of CLIPModel",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_before_anything_changes(case):
    name, inputs, message = BAD[case]
    model = make_network(name)
    before = weights_of(model)
    with pytest.raises(InputError, match=message):
        prune_model(model, inputs if isinstance(inputs, torch.Tensor) else [inputs], method="wanda")
    for own, weight in weights_of(model).items():
        assert torch.equal(weight, before[own])
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_network_is_distilled_longer_than_a_language_model():
    """On as many as 98,304 drawn tokens, in further passes; a number that the method names is taken for both."""
    default, named = PruneConfig("best"), PruneConfig("balanced + distill(tokens=4096, learning_rate=0.001)")
    seed = 0
    assert default.method.distill.budget(causal=True) == 49152
    assert default.method.distill.budget(causal=False) == 491520
    assert {named.method.distill.budget(causal) for causal in (True, False)} == {4096}
    drawn = {causal: distill_draw(default, 128, seed, causal)[0] for causal in (True, False)}
    assert drawn == {True: 49152 // 128 + 8, False: 98304 // 128 + 8}
    assert distill_draw(named, 128, seed, False) == distill_draw(named, 128, seed)
    model = make_network("vit")
    report = prune_model(model, make_inputs("vit"), PruneConfig("best"))
    assert report.healing.settings["learning_rate"] == 0.003
    assert report.healing.settings["passes"] == 12
    report = prune_model(make_network("vit"), make_inputs("vit"), named)
    assert report.healing.settings["learning_rate"] == 0.001
