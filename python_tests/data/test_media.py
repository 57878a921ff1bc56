"""Calibration with images and sound: what a model's own processor makes of files, and what is refused."""

import json
import sys
import wave

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from ace_ext.data.held_out_inputs import TRANSCRIBED, HeldOutInputs, measure
from ace_ext.data.media import load_processor, media_batches
from ace_ext.data.media_items import AUDIO, IMAGE, is_media, media_items
from ace_ext.errors import InputError

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 8, "patch_size": 4}
RATE = 16000


class Both:
    """A processor of two parts, as transformers' are."""

    def __init__(self, tokenizer=None, **parts):
        self.tokenizer = tokenizer
        for name, part in parts.items():
            setattr(self, name, part)


def is_like(processor, kind):
    """Whether it is of this class, or of its sibling that transformers takes where torchvision is installed."""
    return type(processor).__name__.removesuffix("Pil") == kind.__name__.removesuffix("Pil")


@pytest.fixture(scope="module")
def image_processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    size = {"height": 8, "width": 8}
    settings = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(WordLevel({name: n for n, name in enumerate(["<pad>", "<s>", "a", "cat", "sat"])}, unk_token="a"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


@pytest.fixture
def images(tmp_path):
    """Three images of one colour each, one of them in a subfolder, and a file of another kind."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for value, name in enumerate(["a.png", "b.JPG", "more/c.png"]):
        Image.new("RGB" if value else "RGBA", (10, 6), (value * 100,) * 3).save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def save_sound(path, seconds=0.1, rate=RATE, channels=1):
    samples = (torch.linspace(-1, 1, int(seconds * rate) * channels) * 20000).to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().tobytes())


@pytest.fixture
def sounds(tmp_path):
    pytest.importorskip("soundfile")
    folder = tmp_path / "sounds"
    folder.mkdir()
    save_sound(folder / "long.wav", 0.2)
    save_sound(folder / "short.wav", 0.1, channels=2)
    return folder


def save_lines(folder, *records):
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(file)


def vit():
    return ViTModel(ViTConfig(**VISION))


def clip():
    text = {**TINY, "vocab_size": 40, "max_position_embeddings": 2, "eos_token_id": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6))


def whisper(**more):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 80, "vocab_size": 30}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **heads, **tokens, max_source_positions=1500, begin_suppress_tokens=None, **more)
    return WhisperForConditionalGeneration(config)


def test_a_folder_of_images(images, image_processor):
    batches = media_batches(str(images), image_processor, vit(), nsamples=10, batch=2)
    assert [list(batch["pixel_values"].shape) for batch in batches] == [[2, 3, 8, 8], [1, 3, 8, 8]]
    means = torch.cat([batch["pixel_values"] for batch in batches]).mean((1, 2, 3)) * 255
    assert sorted(means.round().int().tolist()) == [0, 100, 200]
    assert vit()(**batches[0]).last_hidden_state.shape == (2, 5, 16)


def test_samples_are_drawn_by_the_seed(images):
    drawn = [media_items(str(images), 2, seed) for seed in (0, 0, 1, 2, 3)]
    assert all(len(found.items) == 2 for found in drawn)
    assert drawn[0] == drawn[1]
    assert len({tuple(item.file for item in found.items) for found in drawn}) > 1


def test_pairs_of_images_and_texts(images, image_processor, tokenizer):
    file = save_lines(
        images, {"image": "a.png", "text": "a cat sat"}, {"image": "more/c.png", "text": "cat", "note": 1}
    )
    model, processor = clip(), Both(tokenizer, image_processor=image_processor)
    (batch,) = media_batches(file, processor, model, nsamples=9, batch=9)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    rows = {tuple(row) for row in batch["input_ids"].tolist()}
    assert rows == {(2, 3), (3, 0)}  # two positions, and padding
    assert model(**batch).logits_per_image.shape == (2, 2)


def test_texts_without_a_mask_fill_all_positions(images, image_processor, tokenizer, monkeypatch):
    """SigLIP reads padding, and its embedding is the last position's: it must not depend on the batch."""
    file = save_lines(images, {"image": "a.png", "text": "a cat sat"}, {"image": "more/c.png", "text": "cat"})
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids"])
    text = {**TINY, "vocab_size": 40, "max_position_embeddings": 5, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).eval()
    processor = Both(tokenizer, image_processor=image_processor)
    (both,) = media_batches(file, processor, model, nsamples=2, batch=2)
    assert set(both) == {"pixel_values", "input_ids"}
    assert sorted(both["input_ids"].tolist()) == [[2, 3, 4, 0, 0], [3, 0, 0, 0, 0]]
    alone = media_batches(file, processor, model, nsamples=2, batch=1)
    assert torch.equal(torch.cat([each["input_ids"] for each in alone]), both["input_ids"])


def test_a_folder_of_sounds(sounds):
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    config = Wav2Vec2Config(**TINY, conv_dim=(8,), conv_stride=(320,), conv_kernel=(400,), num_feat_extract_layers=1)
    model = Wav2Vec2Model(config).eval()
    (batch,) = media_batches(str(sounds), extractor, model, nsamples=2, batch=2)
    assert batch["input_values"].shape == (2, 3200)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [1600, 3200]
    assert model(**batch).last_hidden_state.shape[0] == 2


def test_padding_is_never_read_as_sound(sounds):
    """The first Wav2Vec2 gets no mask, so sounds of other lengths go through it one by one; equal ones together."""
    model = Wav2Vec2Model(Wav2Vec2Config(**TINY, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,)))
    batches = media_batches(str(sounds), Wav2Vec2FeatureExtractor(), model, nsamples=2, batch=2)
    assert sorted(batch["input_values"].shape for batch in batches) == [(1, 1600), (1, 3200)]
    save_sound(sounds / "short.wav", 0.2)
    batches = media_batches(str(sounds), Wav2Vec2FeatureExtractor(), model, nsamples=2, batch=2)
    assert [batch["input_values"].shape for batch in batches] == [(2, 3200)]


class Recorder(torch.nn.Module):
    """A model of speech that writes token 2 for each batch that it hears, and keeps what it was given."""

    main_input_name = "input_features"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = whisper().config
        self.heard = []

    def get_decoder(self):
        return self

    def forward(self, input_features, attention_mask=None):
        return {"logits": input_features * self.weight}

    def generate(self, input_features, attention_mask=None, **_):
        self.heard.append(None if attention_mask is None else attention_mask.tolist())
        return torch.full((len(input_features), 1), 2)


def test_transcripts_are_of_the_sound_without_padding(tokenizer):
    """And of as many samples, whatever the size of a batch."""
    masks = [[[1, 1, 0]], [[1, 1, 1]]] * 12
    batches = [{"input_features": torch.ones(1, 3, 4), "attention_mask": torch.tensor(mask)} for mask in masks]
    model = Recorder()
    found = measure(model, HeldOutInputs("sounds", batches, ["cat"] * 24, Both(tokenizer)))
    assert len(found.transcripts) == TRANSCRIBED
    assert model.heard == masks[:TRANSCRIBED]


def test_sounds_with_transcripts(sounds, tokenizer):
    file = save_lines(sounds, {"audio": "long.wav", "text": "a cat sat"}, {"audio": "short.wav", "text": "cat"})
    model, processor = whisper(), Both(tokenizer, feature_extractor=WhisperFeatureExtractor())
    (batch,) = media_batches(file, processor, model, nsamples=2, batch=2)
    assert batch["input_features"].shape == (2, 80, 3000)
    rows = dict(
        zip(map(tuple, batch["decoder_input_ids"].tolist()), batch["decoder_attention_mask"].tolist(), strict=True)
    )
    assert rows == {(1, 2, 3): [1, 1, 1], (1, 0, 0): [1, 0, 0]}  # from the first token to the last but one


def test_transcripts_of_a_decoder_with_few_positions(sounds, tokenizer):
    """As long as it can write them."""
    file = save_lines(sounds, {"audio": "long.wav", "text": "a cat sat"})
    model, processor = whisper(max_target_positions=20), Both(tokenizer, feature_extractor=WhisperFeatureExtractor())
    batches = media_batches(file, processor, model, nsamples=1, batch=1)
    found = measure(model, HeldOutInputs(file, batches, ["a cat sat"], processor))
    assert len(found.transcripts) == 1


class Multilingual:
    """A tokenizer whose texts begin with a token of their language, as Whisper's."""

    def __init__(self, tokenizer):
        self._tokenizer, self._prefix = tokenizer, []

    def set_prefix_tokens(self, language, task):
        assert task == "transcribe"
        self._language = language

    @property
    def prefix_tokens(self):
        if self._language not in ("en", "de"):
            raise ValueError(f"Unsupported language: {self._language}")
        return [1, {"en": 3, "de": 4}[self._language]]

    def __call__(self, text):
        found = self._tokenizer(text)
        found["input_ids"] = [*self.prefix_tokens, *found["input_ids"]]
        return found


def test_the_language_of_a_transcript(sounds, tokenizer):
    records = [{"audio": "long.wav", "text": "a cat", "language": "en"}, {"audio": "short.wav", "text": "a cat"}]
    model, extractor = whisper(), WhisperFeatureExtractor()
    processor = Both(Multilingual(tokenizer), feature_extractor=extractor)
    file = save_lines(sounds, *({**record, "language": ("en", "de")[n]} for n, record in enumerate(records)))
    (batch,) = media_batches(file, processor, model, nsamples=2, batch=2)
    assert sorted(batch["decoder_input_ids"].tolist()) == [[1, 3, 2], [1, 4, 2]]
    with pytest.raises(InputError, match="has a language, and the model's tokenizer knows none"):
        media_batches(file, Both(tokenizer, feature_extractor=extractor), model, nsamples=2, batch=2)
    with pytest.raises(InputError, match="line 2: has no 'language', other lines have one"):
        media_items(save_lines(sounds, *records), 2, 0)
    file = save_lines(sounds, {"audio": "long.wav", "text": "a cat", "language": "xx"})
    with pytest.raises(InputError, match="line 1: language 'xx' is unknown to the model's tokenizer"):
        media_batches(file, processor, model, nsamples=1, batch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "b.JPG").write_bytes(b"no image"), "b.JPG is not an image that Pillow reads"),
        (lambda folder: (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40]), "a.png is not an image"),
        (lambda folder: Image.new("I;16", (6, 4)).save(folder / "a.png"), r"a.png has more than 8 bits in .*mode I;16"),
        (lambda folder: Image.new("F", (6, 4)).save(folder / "a.tiff"), r"a.tiff has more than 8 bits in .*mode F"),
        (lambda folder: (folder / "d.wav").touch(), "has both images and audio files"),
        (lambda folder: [file.unlink() for file in folder.rglob("*.*g")] + [(folder / "b.JPG").unlink()], "no images"),
    ],
    ids=["other", "cut", "16 bits", "float", "both", "none"],
)
def test_folders_that_are_refused(images, image_processor, change, message):
    change(images)
    with pytest.raises(InputError, match=message):
        media_batches(str(images), image_processor, vit(), nsamples=10, batch=2)


def test_sounds_that_are_refused(sounds):
    extractor, model = Wav2Vec2FeatureExtractor(), whisper()
    model.config.is_encoder_decoder = False  # so that no text is needed
    for content, message in [(b"RIFF", "is not a sound file"), (None, "8000 samples a second, .* needs 16000")]:
        if content is None:
            save_sound(sounds / "long.wav", rate=8000)
        else:
            (sounds / "long.wav").write_bytes(content)
        with pytest.raises(InputError, match=f"long.wav.*{message}"):
            media_batches(str(sounds), extractor, model, nsamples=2, batch=2)
    save_sound(sounds / "long.wav", seconds=0)
    with pytest.raises(InputError, match=r"long.wav has no samples"):
        media_batches(str(sounds), extractor, model, nsamples=2, batch=2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no line; each must be like"),
        (['{"image": "a.png"', "{}"], "line 1: not valid JSON"),
        (['{"image": "a.png"}', '{"text": "a cat"}'], "line 2: must have one of 'image' and 'audio' .found: 'text'"),
        (['{"image": "a.png", "audio": "a.wav"}'], "line 1: must have one of"),
        (["[1]"], "line 1: must have one of 'image' and 'audio' .found: a JSON list"),
        (['{"image": "nowhere.png"}'], "line 1: 'nowhere.png' is not a file; paths are relative to"),
        (['{"image": 3}'], "line 1: 'image' must be a text that is not empty"),
        (['{"image": "a.png", "text": " "}'], "line 1: 'text' must be a text that is not empty"),
        (['{"image": "a.png"}', '{"audio": "notes.txt"}'], "line 2: has 'audio', other lines have 'image'"),
    ],
)
def test_lines_that_are_refused(images, lines, message):
    file = images / "pairs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        media_items(str(file), 10, 0)


def test_a_model_that_needs_texts(images, image_processor, tokenizer):
    with pytest.raises(InputError, match="has no text, and the model reads text with each image"):
        media_batches(str(images), Both(tokenizer, image_processor=image_processor), clip(), nsamples=2, batch=2)
    file = save_lines(images, {"image": "a.png", "text": "a cat"})
    with pytest.raises(InputError, match="no tokenizer for the texts"):
        media_batches(file, image_processor, clip(), nsamples=2, batch=2)


def test_a_model_of_another_kind(images, image_processor):
    with pytest.raises(InputError, match=r"has image files, and WhisperFor.* takes input_features"):
        media_batches(str(images), image_processor, whisper(), nsamples=2, batch=2)


@pytest.mark.parametrize(("module", "extra"), [("PIL", "vision"), ("soundfile", "audio")])
def test_a_missing_library(images, image_processor, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    model, source, processor = vit(), str(images), image_processor
    if extra == "audio":
        (images / "a.wav").touch()
        model, source = whisper(), save_lines(images, {"audio": "a.wav"})
        model.config.is_encoder_decoder = False
        processor = WhisperFeatureExtractor()
    with pytest.raises(InputError, match=rf"pip install 'ace_ext\[{extra}\]'"):
        media_batches(source, processor, model, nsamples=9, batch=2)


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.txt", None])
def test_a_processor_without_its_package(tokenizer, tmp_path, monkeypatch):
    """Its image processor alone loads, but would read no text."""
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    if tokenizer is not None:
        (tmp_path / tokenizer).write_text("{}")

    def missing(*_, **__):
        raise ImportError("it requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    if tokenizer is None:
        assert is_like(load_processor(str(tmp_path)), CLIPImageProcessorPil)
        return
    with pytest.raises(InputError, match=r"not installed \(it requires the Torchvision library\); install it"):
        load_processor(str(tmp_path))


def test_which_sources_are_media(images):
    assert is_media(str(images))
    assert is_media(save_lines(images, {"audio": "a.wav"}))
    assert not is_media(save_lines(images, {"text": "a cat"}))
    assert not is_media("bundled")
    assert not is_media(str(images / "notes.txt"))
    assert (media_items(str(images), 1, 0).kind, IMAGE, AUDIO) == ("image", "image", "audio")


@pytest.mark.parametrize("kind", ["audio", "image"])
def test_a_folder_without_a_tokenizer(tmp_path, kind):
    """The class of processor that belongs to the model has one, and the model reads no text."""
    if kind == "audio":
        model = Wav2Vec2Model(Wav2Vec2Config(**TINY, conv_dim=(8,), conv_stride=(320,), conv_kernel=(400,)))
        part = Wav2Vec2FeatureExtractor()
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**VISION))
        part = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model.save_pretrained(tmp_path)
    part.save_pretrained(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    whole = {"audio": "Wav2Vec2Processor", "image": "CLIPProcessor"}[kind]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "processor_class": whole}))
    found = load_processor(str(tmp_path))
    assert is_like(found, type(part))
    assert not hasattr(found, "tokenizer")


def test_a_folder_without_a_processor(tmp_path):
    with pytest.raises(InputError, match="has no processor that loads"):
        load_processor(str(tmp_path))


def test_a_tokenizer_beside_a_model_that_reads_no_text(images, image_processor, tokenizer, tmp_path):
    """``AutoProcessor`` finds the tokenizer alone there."""
    vit().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    alone = load_processor(str(tmp_path))
    with pytest.raises(InputError, match="has a tokenizer and no processor for images or sound"):
        media_batches(str(images), alone, vit(), nsamples=9, batch=2)
    with pytest.raises(InputError, match="takes input_features"):
        media_batches(str(images), alone, whisper(), nsamples=9, batch=2)
    image_processor.save_pretrained(tmp_path)
    found = load_processor(str(tmp_path))
    assert type(found) is type(image_processor)
    assert media_batches(str(images), found, vit(), nsamples=9, batch=2)
