"""Calibration of a language model that sees on images with their texts, from files: what its processor makes of them,
whole runs, and what is refused."""

import json

import pytest
import torch
import transformers
from engine.test_image_inputs import CASES, IMAGE, PICTURE
from folders import call
from models.test_model_class import MODELS
from PIL import Image
from tiny_models import _SMALL
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from ace_ext import InputError, prune_model
from ace_ext.data.media import load_processor, media_batches

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "a", "cat", "sat"]
TEXTS = ["a cat", "a cat sat", "sat", "cat a cat", "a"]
USER, ASSISTANT, COLON = (WORDS.index(word) for word in ("user", "assistant", ":"))


IMAGES = {"image_token": "<image>"}
SIZE = {"size": {"shortest_edge": PICTURE}, "crop_size": {"height": PICTURE, "width": PICTURE}}
SIGHT = {"image_size": PICTURE, "patch_size": 8}
SIGHT |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_tokenizer(**more):
    rest = [f"w{number}" for number in range(len(WORDS), IMAGE)]
    known = {word: number for number, word in enumerate([*WORDS, *rest, "<image>"])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken("<image>", special=True)])
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **ends, **more)


def make_processor(template):
    parts = {"image_token": "<image>", "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    image_processor = CLIPImageProcessorPil(**SIZE)
    return LlavaProcessor(image_processor, make_tokenizer(), patch_size=8, chat_template=template, **parts)


def write_pairs(folder):
    """Images of noise and their texts, in ``pairs.jsonl``."""
    (folder / "images").mkdir()
    for number in range(len(TEXTS)):
        noise = torch.randint(256, (9, 12, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "images" / f"{number}.png")
    lines = [json.dumps({"image": f"images/{number}.png", "text": text}) for number, text in enumerate(TEXTS)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))


@pytest.fixture(params=[TEMPLATE, None], ids=["template", "plain"])
def place(request, tmp_path, monkeypatch):
    """A small LLaVA with its processor, and images with their texts."""
    torch.manual_seed(0)
    CASES["llava"][0]().save_pretrained(tmp_path / "llava")
    make_processor(request.param).save_pretrained(tmp_path / "llava")
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batches_of(model):
    return media_batches("pairs.jsonl", load_processor("llava"), model, nsamples=4, batch=8)


RUN = ["run", "--model", "llava", "--calibration", "pairs.jsonl", "--nsamples", "4", "--output"]


def test_the_user_shows_the_image_and_the_assistant_says_the_text(place, request):
    model = AutoModelForImageTextToText.from_pretrained("llava")
    batches = batches_of(model)
    assert len(batches) == 4
    ids = {tuple(WORDS.index(word) for word in text.split()) for text in TEXTS}
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
        assert batch["pixel_values"].shape == (1, 3, PICTURE, PICTURE)
        (row,) = batch["input_ids"].tolist()
        before, after = [], []
        if "template" in request.node.name:
            before, after = [USER, COLON], [ASSISTANT, COLON]
        start = len(before) + 16 + len(after)
        assert row[:start] == [*before, *[IMAGE] * 16, *after]
        assert tuple(row[start:]) in ids
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("towers", [None, "model.vision_tower.encoder.layers"], ids=["language", "tower"])
def test_a_run_prunes_as_in_memory(towers, place, capsys):
    options = ["--method", "balanced", *(["--towers", towers] if towers else [])]
    status, _, error = call(capsys, *RUN, "new", *options)
    assert status == 0, error
    assert call(capsys, "verify", "new")[0] == 0
    assert call(capsys, *RUN, "disk", *options, "--offload", "disk")[0] == 0
    expected = AutoModelForImageTextToText.from_pretrained("llava").eval()
    chosen = {"towers": [towers]} if towers else {}
    report = prune_model(expected, batches_of(expected), method="balanced", sparsity=0.5, **chosen)
    assert {("vision_tower" in matrix.name) for matrix in report.matrices} == {towers is not None}
    for folder in ("new", "disk"):
        found = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


REFUSED = {
    "remove": (["--remove", "neurons=0.25"], "remove is calibrated on text, and calibration 'pairs.jsonl' has images"),
    "distill": (["--method", "better"], "distill trains a language model on text, and calibration 'pairs.jsonl' has"),
    "texts": (["--calibration", "images"], ".png has no text, and the model reads text with each image"),
    "evaluate": (["--evaluate", "wiki-mini"], "evaluate is for text with this model"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("place", [TEMPLATE], indirect=True, ids=["template"])
def test_what_needs_text_is_refused(what, place, capsys):
    given, message = REFUSED[what]
    status, _, error = call(capsys, *RUN, "new", *given)
    assert (status, error.count("\n")) == (2, 1), error
    assert message in error
    assert not (place / "new").exists()


@pytest.mark.parametrize("place", [TEMPLATE], indirect=True, ids=["template"])
def test_healing_takes_a_text(place, capsys):
    assert call(capsys, *RUN, "new", "--method", "wanda")[0] == 0
    status, _, error = call(capsys, "heal", "new", "--output", "healed")
    assert (status, error.count("\n")) == (2, 1), error
    assert "this model is healed on text: give --calibration with one" in error


def test_a_processor_that_refuses_a_sample_names_it(tmp_path):
    """A template that knows no images: LLaVA's processor finds no place for the image's tokens."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png", "text": "a cat"}')
    processor = make_processor("{{ raise_exception('no images') }}")
    with pytest.raises(InputError, match=r"pairs.jsonl, line 1: LlavaProcessor makes no inputs of it: .*no images"):
        media_batches(str(tmp_path / "pairs.jsonl"), processor, MODELS["LlavaForConditionalGeneration"](), 1, 1)


def git():
    """The model puts the image's states before the text itself, and its text has no token for them."""
    processor = transformers.GitProcessor(CLIPImageProcessorPil(**SIZE), make_tokenizer())
    config = transformers.GitConfig(vision_config=SIGHT, vocab_size=64, **{**SIGHT, "image_size": None})
    return transformers.GitForCausalLM(config), processor, 0


def paligemma():
    """Text also attends to later tokens, and the processor writes labels, which would only be a loss."""
    image_processor = SiglipImageProcessorPil(size={"height": PICTURE, "width": PICTURE})
    image_processor.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor, make_tokenizer(extra_special_tokens=IMAGES))
    parts = {"vision_config": {**SIGHT, "model_type": "siglip_vision_model"}}
    parts["text_config"] = {**_SMALL, "model_type": "gemma", "head_dim": 8}
    config = transformers.PaliGemmaConfig(**parts, image_token_id=IMAGE, projection_dim=32)
    return transformers.PaliGemmaForConditionalGeneration(config), processor, 16 + 1  # and the first token of a text


@pytest.mark.parametrize("make", [git, paligemma])
def test_other_ways_to_put_an_image_into_a_text(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path)
    model, processor, before = make()
    model.save_pretrained("model")
    processor.save_pretrained("model")
    batches = media_batches("pairs.jsonl", load_processor("model"), model, nsamples=4, batch=8)
    lengths = {len(text.split()) + before for text in TEXTS}
    assert {len(row) for batch in batches for row in batch["input_ids"]} <= lengths
    assert {len(batch["input_ids"]) for batch in batches} == {1}
    assert all("labels" not in batch for batch in batches)
    run = ["run", "--model", "model", "--calibration", "pairs.jsonl", "--nsamples", "4", "--method", "balanced"]
    status, _, error = call(capsys, *run, "--output", "new")
    assert status == 0, error
    prune_model(model.eval(), batches, method="balanced", sparsity=0.5)
    found = type(model).from_pretrained("new").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


class Hearing:
    """A processor of sound with a template, as Qwen2-Audio's."""

    chat_template = "any"

    def __init__(self, part):
        self.tokenizer, self.seen = object(), []
        if part is not None:
            setattr(self, part, transformers.WhisperFeatureExtractor())

    def apply_chat_template(self, conversations, **options):
        self.seen.append((conversations, options))
        return {"input_ids": torch.ones(1, 3, dtype=torch.long), "other": [1]}


NAMES = [("feature_extractor", lambda input_ids, input_features=None: None)]
NAMES += [("audio_processor", lambda input_ids, audio_input_features=None: None)]  # of Phi-4


def heard(tmp_path, part, forward):
    """What makes batches of one sound, but for the processor and the model."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.wav", torch.linspace(-0.5, 0.5, 1600).numpy(), 16000)
    (tmp_path / "pairs.jsonl").write_text('{"audio": "a.wav", "text": "a cat"}')
    model = MODELS["LlavaForConditionalGeneration"]()
    model.forward = forward
    return Hearing(part), model


@pytest.mark.parametrize(("part", "forward"), NAMES, ids=["usual", "phi-4"])
def test_sound_is_shown_in_the_same_way(part, forward, tmp_path):
    processor, model = heard(tmp_path, part, forward)
    (batch,) = media_batches(str(tmp_path / "pairs.jsonl"), processor, model, 1, 1)
    assert list(batch) == ["input_ids"]
    ((shown, said),) = processor.seen[0][0]
    assert shown["content"][0]["audio"].shape == (1600,)
    assert said == {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}


def test_a_processor_without_a_rate_of_sound_is_refused(tmp_path):
    processor, model = heard(tmp_path, None, NAMES[0][1])
    with pytest.raises(InputError, match="model: its processor, Hearing, says no rate of sound"):
        media_batches(str(tmp_path / "pairs.jsonl"), processor, model, 1, 1)
