"""A checkpoint is opened as the class that it names: classifiers and models without an LM head stay what they are, the
blocks of a vision-language model are those of its language part, and what reads no text in order is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from folders import TEXT, bad_input, call, prune, weights_bytes
from tiny_models import _SMALL, VOCABULARY, make_english_tokenizer, make_tokenizer, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.data.bos import choose_bos
from ace_ext.models._transformers import model_class
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model

_SIGHT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
"""More weights than the language part has."""


def _llava():
    sight = transformers.CLIPVisionConfig(**_SIGHT, image_size=32, patch_size=8)
    text = transformers.LlamaConfig(**_SMALL)
    config = transformers.LlavaConfig(vision_config=sight, text_config=text, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl():
    sight = {"depth": 6, "embed_dim": 64, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: 60 + number for number, name in enumerate(names)}
    config = transformers.Qwen2VLConfig(text_config={**_SMALL, "rope_parameters": rope}, vision_config=sight, **ids)
    return transformers.Qwen2VLForConditionalGeneration(config)


def _gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = transformers.Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=8, layer_types=kinds)
    sight = transformers.SiglipVisionConfig(**_SIGHT, image_size=32, patch_size=8)
    ids = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def _of_llama(name: str, **more):
    return getattr(transformers, name)(transformers.LlamaConfig(**_SMALL, **more))


MODELS = {
    "LlamaForSequenceClassification": lambda: _of_llama("LlamaForSequenceClassification", tie_word_embeddings=True),
    "LlamaForTokenClassification": lambda: _of_llama("LlamaForTokenClassification"),
    "LlamaModel": lambda: _of_llama("LlamaModel", tie_word_embeddings=True),
    "LlavaForConditionalGeneration": _llava,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Gemma3ForConditionalGeneration": _gemma3,
}
HEADLESS = [*MODELS][:3]


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def saved(name: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save(MODELS[name](), folder)


@pytest.mark.parametrize("name", MODELS)
def test_the_class_of_the_checkpoint_is_kept(name, tmp_path, capsys):
    dense = saved(name, tmp_path / "dense")
    text = {"source": "tokens"}
    _, out = prune(dense, tmp_path / "out", calibration=text)
    assert json.loads((out / "config.json").read_text())["architectures"] == [name]
    again = prune(dense, tmp_path / "again", {"offload": "disk"}, text)[1]
    assert weights_bytes(out) == weights_bytes(again)
    expected = getattr(transformers, name).from_pretrained(dense, dtype="auto")
    prune_model(expected, make_tokens(8, 16), PruneConfig("wanda"))
    found, info = getattr(transformers, name).from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    pairs = zip(expected.state_dict().items(), found.state_dict().values(), strict=True)
    assert all(torch.equal(value, other) for (_, value), other in pairs)
    status, printed, error = call(capsys, "verify", out)
    assert (status, error) == (0, ""), printed


@pytest.mark.parametrize("name", [*MODELS][3:])
def test_blocks_of_the_language_part(name):
    model = MODELS[name]()
    assert len(find_blocks(model)) == _SMALL["num_hidden_layers"]
    assert all("language_model" in block.name for block in find_blocks(model))


def test_the_command_line_opens_a_model_that_sees(tmp_path, capsys):
    dense = saved("LlavaForConditionalGeneration", tmp_path / "dense")
    text = ("--calibration", tmp_path / "text.txt", "--nsamples", 4, "--seqlen", 8)
    status, _, error = call(capsys, "run", "--model", dense, "--output", tmp_path / "out", *text)
    assert status == 0, error
    assert call(capsys, "verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("name", HEADLESS)
def test_without_an_lm_head(name, tmp_path, capsys):
    """It writes no text, cannot be distilled and has no perplexity; each is said before anything is written."""
    dense = saved(name, tmp_path / "dense")
    for options in (("--calibration", "self"), ("--method", "best")):
        assert f"{name} has no LM head" in bad_input(capsys, "run", dense, *options)
        assert f"{name} has no LM head" in bad_input(capsys, "plan", dense, *options)
    assert f"{name} has no LM head" in bad_input(capsys, "eval", dense)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_bos_of_a_model_without_an_lm_head():
    choice = choose_bos("auto", make_english_tokenizer(), MODELS["LlamaForSequenceClassification"]())
    assert choice.token is None
    assert "without an LM head" in choice.why


def test_what_reads_no_text_from_left_to_right(tmp_path, capsys):
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, intermediate_size=48))
    with pytest.raises(InputError, match="is an encoder"):
        load_model(str(save(bert, tmp_path / "bert")))
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=32, **layers, **heads)
    bart = save(transformers.BartForConditionalGeneration(config), tmp_path / "bart")
    with pytest.raises(InputError, match=r"has an encoder and a decoder \(BartForConditionalGeneration\)"):
        load_model(str(bart))
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**_SIGHT, image_size=32, patch_size=8))
    folder = save(vit, tmp_path / "vit")
    with pytest.raises(InputError, match="not a language model: ViTForImageClassification reads pixel_values"):
        load_model(str(folder))
    for verb in ("plan", "run"):
        assert "reads pixel_values (ViTForImageClassification), so text does not" in bad_input(capsys, verb, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "not a language model: ViTForImageClassification reads" in bad_input(capsys, "eval", folder)


def test_a_class_of_another_configuration_is_not_taken(tmp_path):
    """As in a config.json that was edited by hand: the configuration decides."""
    dense = saved("LlamaForSequenceClassification", tmp_path / "dense")
    values = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(values | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InputError, match="do not match its configuration"):
        load_model(str(dense))


def test_code_of_the_checkpoint_comes_first():
    """Also if its class has a name that transformers has too."""
    config = transformers.LlamaConfig(**_SMALL, architectures=["LlamaForCausalLM"])
    assert model_class(config) is transformers.LlamaForCausalLM
    config.auto_map = {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}
    assert model_class(config) is transformers.AutoModelForCausalLM


def test_gemma3n_is_refused_before_a_block_changes():
    """Its blocks share keys and values, and hidden states of four dimensions: no block can be trained by itself."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    small = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    more = {"activation_sparsity_pattern": [0.0] * 3, "num_kv_shared_layers": 0, "layer_types": kinds}
    config = transformers.Gemma3nTextConfig(**_SMALL, head_dim=8, sliding_window=8, **small, **more)
    model = transformers.Gemma3nForCausalLM(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"cannot be walked block by block: .*; leave out train$"):
        prune_model(model, make_tokens(), PruneConfig("wanda + train"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Joined(transformers.PreTrainedModel):
    """As Qwen2.5-Omni: what thinks and what talks, which its ``generate`` calls one after the other."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.thinker, self.between = transformers.LlamaForCausalLM(config), torch.nn.Linear(2, 2)
        self.talker = transformers.LlamaForCausalLM(config)
        self.post_init()


def test_a_class_that_only_joins_models_names_them():
    model = Joined(transformers.LlamaConfig(**_SMALL))
    with pytest.raises(InputError, match=r"^Joined cannot be called: .*, model.thinker or model.talker$"):
        prune_model(model, make_tokens(2, 8), method="wanda", sparsity=0.5)
    prune_model(model.thinker, make_tokens(2, 8), method="wanda", sparsity=0.5)
