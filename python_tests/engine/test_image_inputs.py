"""Calibration with images: the inputs of a model's calls, as its processor returns them."""

from contextlib import ExitStack

import numpy
import pytest
import torch
import transformers
from models.test_model_class import MODELS
from tiny_models import _SMALL, make_model, make_tokenizer, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.trial import try_walk

IMAGE, PICTURE = 63, 32  # the token in whose place an image's states come, and the width of an image


def _qwen3_vl():
    """Features of the image also go into the hidden states between the first blocks."""
    sight = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8}
    more = {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: IMAGE - number for number, name in enumerate(names)}
    text = {**_SMALL, "head_dim": 8, "rope_parameters": rope}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**sight, **more}, **ids)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _mllama():
    """The second block attends to the image's states, which are none of the tokens'."""
    sight = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_global_layers": 1}
    more = {"attention_heads": 4, "image_size": PICTURE, "patch_size": 8, "max_num_tiles": 1, "vision_output_dim": 64}
    some = {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**_SMALL, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(
        text_config=text, vision_config={**sight, **more, **some}, image_token_index=IMAGE
    )
    model = transformers.MllamaForConditionalGeneration(config)
    with torch.no_grad():  # 0 in a new model
        for block in model.model.language_model.layers:
            for name, gate in block.named_parameters():
                gate.fill_(1.0) if name.endswith("gate") else None
    return model


def _tokens(of_image: int, image: int = IMAGE):
    """``[2, 24]`` tokens, an image's among them."""
    tokens = make_tokens(2, 24).clamp(max=50)
    tokens[:, 3 : 3 + of_image] = image
    return tokens


def _pixels(*shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _in_patches(image: int):
    tokens = _tokens(4, image)
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (tokens == image).long()}
    return {"input_ids": tokens, "pixel_values": _pixels(32, 2 * 3 * 8 * 8), **grid}


def _in_tiles():
    ones = torch.ones(2, 24, 1, 1, dtype=torch.long)
    shape = {"aspect_ratio_ids": ones[:, 0, 0], "aspect_ratio_mask": ones[:, 0], "cross_attention_mask": ones}
    return {"input_ids": _tokens(1), "pixel_values": _pixels(2, 1, 1, 3, PICTURE, PICTURE), **shape}


def _whole(of_image: int, **more):
    return {"input_ids": _tokens(of_image), "pixel_values": _pixels(2, 3, PICTURE, PICTURE), **more}


CASES = {
    "llava": (MODELS["LlavaForConditionalGeneration"], lambda: _whole(16)),
    "gemma3": (
        MODELS["Gemma3ForConditionalGeneration"],
        lambda: _whole(4, token_type_ids=(_tokens(4) == IMAGE).long()),
    ),
    "qwen2-vl": (MODELS["Qwen2VLForConditionalGeneration"], lambda: _in_patches(60)),
    "qwen3-vl": (_qwen3_vl, lambda: _in_patches(IMAGE)),
    "mllama": (_mllama, _in_tiles),
}


def made(name: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[name][0]().eval(), CASES[name][1]()


def inputs_of(model, block, batch):
    """The inputs ``[tokens, d_in]`` of a block's Linears, by name, in a forward pass of the whole model."""
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for child, linear in block.linears.items():
            note = lambda _, x, child=child: inputs.update({child: x[0].flatten(0, -2)})  # noqa: E731
            handle = linear.register_forward_pre_hook(note)
            hooks.callback(handle.remove)
        model(**batch, use_cache=False)
    return inputs


@torch.no_grad()
def pruned_by_definition_(model, batch):
    """Wanda, block after block, each from a forward pass of the whole model. Returns how many tokens went through the
    first Linear of each block."""
    tokens = []
    for block in find_blocks(model):
        inputs = inputs_of(model, block, batch)
        for child, x in inputs.items():
            weight = block.linears[child].weight
            score = weight.abs() * x.double().norm(dim=0).float()
            weight.scatter_(1, score.topk(score.shape[1] // 2, dim=1, largest=False).indices, 0.0)
        tokens.append(len(next(iter(inputs.values()))))
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_the_tokens_of_text_and_image(name):
    model, batch = made(name)
    expected, _ = made(name)
    tokens = pruned_by_definition_(expected, batch)
    report = prune_model(model, [batch], PruneConfig("collect(order=block) + wanda"))
    by_name = {matrix.name: matrix.tokens for matrix in report.matrices}
    for block, count in zip(find_blocks(model), tokens, strict=True):
        assert by_name[block.full_name(next(iter(block.linears)))] == count == batch["input_ids"].numel()
    different = {
        key: ((value != 0) != (expected.state_dict()[key] != 0)).float().mean().item()
        for key, value in model.state_dict().items()
    }
    # Two scores that are nearly equal may change places, as the sums of squares are rounded in another order.
    assert max(different.values()) < 2e-3, different
    only_text, _ = made(name)
    prune_model(only_text, batch["input_ids"], PruneConfig("collect(order=block) + wanda", max_dense=1.0))
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), only_text.parameters(), strict=True)]
    assert not all(same)  # the image made a difference


@pytest.mark.parametrize("name", CASES)
def test_the_vision_tower_is_left_alone(name):
    model, batch = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = tuple(f"{block.name}." for block in find_blocks(model))
    report = prune_model(model, [batch], PruneConfig("wanda"))
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items() if not key.startswith(blocks)
    )


def test_an_image_that_reaches_the_blocks_in_two_ways_is_seen():
    """Text alone goes from block to block; the trial takes the image with it."""
    model, batch = made("qwen3-vl")
    store = ResidentBlocks(find_blocks(model))
    assert try_walk(model, store, {"input_ids": batch["input_ids"]}).reason is None
    assert try_walk(model, store, batch).reason == "its blocks read more than the output of the one before"
    with pytest.raises(InputError, match=r"leave out train$"):
        prune_model(model, [batch], PruneConfig("wanda + train"))


def test_padding_beside_an_image_does_not_count():
    plain, batch = made("llava")
    padded, _ = made("llava")
    mask = torch.cat([torch.ones_like(batch["input_ids"]), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    longer = torch.cat([batch["input_ids"], torch.zeros(2, 5, dtype=torch.long)], dim=1)
    prune_model(plain, [batch], PruneConfig("wanda"))
    report = prune_model(padded, [{**batch, "input_ids": longer, "attention_mask": mask}], PruneConfig("wanda"))
    assert {matrix.tokens for matrix in report.matrices} == {batch["input_ids"].numel()}
    for (name, value), other in zip(plain.state_dict().items(), padded.state_dict().values(), strict=True):
        assert ((value != 0) != (other != 0)).float().mean() < 2e-3, name


def processor():
    """LLaVA's, of a tiny tokenizer: 16 patches of an image, and no token for the class."""
    side = {"height": PICTURE, "width": PICTURE}
    pictures = transformers.CLIPImageProcessor(size=side, crop_size=side)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def test_what_a_processor_returns_is_taken_as_it_is():
    """As in docs/getting-started.md; also with padding, and one batch outside a list."""
    model, _ = made("llava")
    process = processor()
    model.config.image_token_id = process.tokenizer.convert_tokens_to_ids("<image>")
    pictures = [numpy.full((40, 50, 3), value, numpy.uint8) for value in (0, 200)]
    texts = ["<image> the quick brown fox", "<image> the dog"]
    inputs = process(images=pictures, text=texts, padding=True, return_tensors="pt")
    report = prune_model(model, [inputs], PruneConfig("wanda"))
    assert {matrix.tokens for matrix in report.matrices} == {int(inputs["attention_mask"].sum())}
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    alone, _ = made("llava")
    alone.config.image_token_id = model.config.image_token_id
    prune_model(alone, inputs, PruneConfig("wanda"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 2, 3]]}, r'must be tensors \(got list for input_ids\); .*return_tensors="pt"'),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, r"must have input_ids \(got pixel_values\)"),
        ({}, r"must have input_ids \(got nothing\)"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"input_ids must be \[batch, seqlen\] \(got shape \[4\]\)"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)},
            r"attention_mask must have the shape of input_ids, \[1, 4\] \(got \[1, 3\]\)",
        ),
        ("the text itself", r"must be tensors of tokens or dicts of the model's inputs \(got str\)"),
    ],
    ids=["lists", "no-tokens", "nothing", "one-dimension", "mask", "text"],
)
def test_inputs_that_no_call_takes(batch, message):
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        prune_model(model, [batch], method="wanda")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_none_is_left_out():
    model, other = make_model("llama"), make_model("llama")
    prune_model(model, [{"input_ids": make_tokens(), "pixel_values": None}], method="wanda")
    prune_model(other, [make_tokens()], method="wanda")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_padding_of_tokens_that_the_model_adds_itself_is_refused():
    """A model that puts an image's states beside its tokens has more of them than the mask has."""
    model = make_model("llama")

    def with_two_more(_, args, named):
        mask = named.get("attention_mask")
        more = torch.ones(2, 2, dtype=torch.long)
        return args, {**named, "attention_mask": None if mask is None else torch.cat([more, mask], dim=1)}

    model.register_forward_pre_hook(with_two_more, with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: torch.cat([out[:, :2], out], dim=1))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": make_tokens(2, 8)}
    report = prune_model(model, [inputs], method="wanda")
    assert {matrix.tokens for matrix in report.matrices} == {20}
    with pytest.raises(InputError, match=r"\[2, 10\] \(got \[2, 8\]\); give batches without padding"):
        prune_model(model, [{**inputs, "attention_mask": mask}], method="wanda")
