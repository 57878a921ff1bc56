"""The examples of ``docs/networks.md`` run, one after the other, on tiny models."""

import json
import re
import wave
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

PAGE = Path(__file__).parents[2] / "docs/networks.md"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
IMAGES = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_resize": True}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "a", "cat"]


def save_tokenizer(folder):
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def save_encoder():
    BertModel(BertConfig(**SIZES, vocab_size=len(WORDS))).save_pretrained("encoder")
    save_tokenizer("encoder")


def save_vision():
    ViTForImageClassification(ViTConfig(**VISION)).save_pretrained("classifier")
    Path("classifier", "preprocessor_config.json").write_text(json.dumps(IMAGES))
    text = {**SIZES, "vocab_size": len(WORDS), "eos_token_id": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)).save_pretrained("clip")
    save_tokenizer("clip")
    processor = {"processor_class": "CLIPProcessor", "image_processor": IMAGES}
    Path("clip", "processor_config.json").write_text(json.dumps(processor))
    Path("clip", "preprocessor_config.json").write_text(json.dumps(IMAGES))
    Path("photos").mkdir()
    for number in range(4):
        noise = torch.randint(256, (9, 12, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(f"photos/{number}.png")
    lines = [{"image": f"photos/{number}.png", "text": "a cat"} for number in range(4)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))


def save_speech():
    pytest.importorskip("soundfile")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(WORDS)}
    tokens = {"pad_token_id": 4, "bos_token_id": 4, "eos_token_id": 4, "decoder_start_token_id": 5}
    config = WhisperConfig(**sizes, **heads, **tokens, max_source_positions=1500, begin_suppress_tokens=None)
    WhisperForConditionalGeneration(config).save_pretrained("whisper")
    tokenizer = WhisperTokenizer(vocab={word: n for n, word in enumerate(WORDS)}, merges=[])
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained("whisper")
    for number in range(2):
        with wave.open(f"{number}.wav", "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(torch.randint(-9999, 9999, (1600,), dtype=torch.int16).numpy().tobytes())
    lines = [{"audio": f"{number}.wav", "text": "a cat"} for number in range(2)]
    Path("spoken.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_encoder()
    save_vision()
    save_speech()
    names: dict = {"sentences": ["a cat", "cat a a"] * 9, "held_out": ["a a cat", "cat", "cat cat a"]}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert "Agreement(samples=3, cosine=" in capsys.readouterr().out
    for name in ("encoder", "classifier", "towers", "whisper"):
        weights = [p for n, p in names[name].named_parameters() if "layers.0" in n or "layer.0" in n]
        zeros = sum(int((p == 0).sum()) for p in weights if p.dim() == 2)
        assert zeros == sum(p.numel() for p in weights if p.dim() == 2) / 2, name
