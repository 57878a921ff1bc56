"""What is padding in the towers of language models that see or hear."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from engine.test_image_inputs import CASES, PICTURE
from models.test_model_class import MODELS
from tiny_models import _SMALL

from ace_ext import InputError, prune_model
from ace_ext.models.token_masks import TokenMasks
from ace_ext.models.tower_masks import tower_mask

VISION, SOUND = "model.vision_tower.encoder.layers.0", "audio_tower.layers.0"


def masked(name, mask, hidden, block=VISION, more=None):
    """What the first block of a tower leaves out, beside an image's or sound's mask."""
    masks = TokenMasks(MODELS["LlavaForConditionalGeneration"](), plain=False)
    batch = {"input_ids": torch.ones(1, 5), name: mask} | (more or {})
    masks.check_used([block], batch)
    return masks.of(block, batch, torch.zeros(hidden))


def test_padding_of_sound_does_not_count_in_its_tower():
    """Blocks see every second or fourth frame, from the first one on."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    assert masked("feature_attention_mask", mask, (1, 4, 6), SOUND).tolist() == [True, True, False, False]
    assert masked("input_features_mask", mask[:, :4], (1, 4, 6), SOUND).tolist() == [True, True, True, False]
    assert masked("input_features_mask", mask[:, :7], (1, 2, 6), SOUND).tolist() == [True, False]
    with pytest.raises(InputError, match=r"feature_attention_mask must have an entry for each token .* \[1, 3\]"):
        masked("feature_attention_mask", mask[:, :4], (1, 3, 6), SOUND)


def test_samples_of_sound_one_after_the_other_have_no_padding():
    """As in Qwen2.5-Omni: 3 and 6 frames, of which blocks see every second."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert masked("feature_attention_mask", mask, (5, 6), SOUND) is None
    with pytest.raises(InputError, match="feature_attention_mask must have an entry for each token"):
        masked("feature_attention_mask", mask, (6, 6), SOUND)


def test_each_tower_has_the_masks_of_its_sense():
    frames = {"input_features_mask": torch.ones(1, 3, dtype=torch.long)}
    mask = torch.tensor([[1, 1, 0, 0]])
    assert masked("pixel_attention_mask", mask, (1, 4, 6), more=frames).tolist() == [True, True, False, False]
    with pytest.raises(InputError, match=r"pixel_attention_mask .* fits none of the pruned parts"):
        masked("pixel_attention_mask", mask, (1, 3, 6), SOUND, more=frames)


def test_patches_without_a_pixel_do_not_count_in_their_tower():
    """Of three images the first has a narrow strip of a second column of patches, and the last is none."""
    mask = torch.zeros(1, 3, 4, 6, dtype=torch.long)
    mask[0, 0, :2, :3] = mask[0, 1] = 1
    found = masked("pixel_attention_mask", mask, (2, 6, 8))
    assert found.tolist() == [True, True, False, False, False, False, *[True] * 6]
    assert masked("pixel_attention_mask", mask[:, 1:2], (1, 6, 8)) is None


def test_patches_at_no_position_do_not_count_in_their_tower():
    positions = torch.tensor([[[0, 0], [1, 0], [-1, -1]], [[0, 0], [-1, -1], [-1, -1]]])
    assert masked("image_position_ids", positions, (2, 3, 6)).tolist() == [True, True, False, True, False, False]
    assert masked("image_position_ids", positions[:1, :2], (1, 2, 6)) is None


def test_the_tower_of_gemma_4_is_pruned_by_patches_of_the_image():
    """The processor pads patches to the largest number of them."""
    sight = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sight |= {"num_key_value_heads": 4, "head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2}
    text = {**_SMALL, "head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    tokens = {"image_token_id": 63, "boi_token_id": 62, "eoi_token_id": 61, "video_token_id": 60, "audio_token_id": 59}
    model = transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(text_config=text, vision_config=sight, audio_config=None, **tokens)
    )
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).flatten(0, 1)
    padding = torch.full((8, 2), -1)
    batch = {
        "input_ids": torch.tensor([[1, 2, 62, 63, 63, 63, 63, 61, 3]]),
        "pixel_values": torch.rand(1, 24, 192),
        "image_position_ids": torch.cat([places, padding])[None],
        "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]]),
    }
    report = prune_model(model.eval(), [batch], method="wanda", sparsity=0.5, towers=["vision_tower"])
    assert {matrix.tokens for matrix in report.matrices} == {16}


def test_the_tower_of_llama_3_2_is_pruned_by_places_of_patches_and_class():
    """Places of a tile are padded to a multiple of eight."""
    make, inputs = CASES["mllama"]
    report = prune_model(make().eval(), [inputs()], method="wanda", sparsity=0.5, towers=["vision_model"])
    assert {matrix.tokens for matrix in report.matrices} == {2 * ((PICTURE // 8) ** 2 + 1)}


def test_tiles_that_an_image_does_not_fill_do_not_count():
    tiles = torch.tensor([[[1, 0], [1, 1]]])
    sight = SimpleNamespace(image_size=16, patch_size=8)  # 5 places of 8
    found = tower_mask("aspect_ratio_mask", tiles, torch.zeros(2, 16, 6), SimpleNamespace(vision_config=sight))
    used, none = [True] * 5 + [False] * 3, [False] * 8
    assert found.tolist() == [[*used, *none], [*used, *used]]


def test_padding_of_texts_that_no_pruned_part_reads():
    """CLIP's tower of images alone is pruned."""
    masks = TokenMasks(MODELS["LlavaForConditionalGeneration"](), plain=False)
    batch = {"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])}
    masks.check_used(["vision_model.encoder.layers.0"], batch)
    masks.check_used(["vision_model.encoder.layers.0", "text_model.encoder.layers.0"], batch)
    assert masks.of("vision_model.encoder.layers.0", batch, torch.zeros(1, 5, 6)) is None
    assert masks.of("text_model.encoder.layers.0", batch, torch.zeros(1, 3, 6)).tolist() == [True, True, False]


def test_a_tower_that_also_reads_the_text_leaves_its_padding_out():
    """Of BridgeTower: 12 places of text, of which 2 and 6 are padding in the samples, and 5 of each image."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    text = {**sizes, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}
    sight = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.BridgeTowerConfig(
        text_config=text, vision_config=sight, **{**sizes, "num_hidden_layers": 2}, image_size=16
    )
    mask = (torch.arange(12) < torch.tensor([[10], [6]])).long()
    batch = {
        "input_ids": torch.randint(8, 60, (2, 12)),
        "attention_mask": mask,
        "pixel_values": torch.rand(2, 3, 16, 16),
    }
    model = transformers.BridgeTowerModel(config).eval()
    report = prune_model(model, [batch], method="wanda", sparsity=0.5, towers=["cross_modal_image_layers"])
    tokens = {matrix.name.partition(".0.")[2]: matrix.tokens for matrix in report.matrices}
    assert tokens["crossattention.self.key"] == tokens["crossattention.self.value"] == 16
    assert tokens["crossattention.self.query"] == tokens["attention.self.key"] == 10
