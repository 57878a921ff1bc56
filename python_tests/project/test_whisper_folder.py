"""``tools/whisper_folder.py`` on a tiny model for CTranslate2, which the test writes."""

import json
import struct

import pytest
import torch
from helpers import script
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoProcessor, WhisperConfig, WhisperForConditionalGeneration

TOOL = "tools/whisper_folder.py"
SIZES = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 40, "encoder_layers": 2, "decoder_layers": 1}
SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startofprev", "notimestamps"]
TYPES = [torch.float32, torch.int8, torch.int16, torch.int32, torch.float16]


@pytest.fixture(scope="module")
def tool():
    return script(TOOL)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    limits = {"max_source_positions": 12, "max_target_positions": 9, "vocab_size": 30, "num_mel_bins": 80}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(**SIZES, **heads, **limits, **tokens, begin_suppress_tokens=None)
    model = WhisperForConditionalGeneration(config).half()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "layer_norm.weight")):
            torch.nn.init.normal_(parameter)  # not all zeros or ones, as a new model's are
    return model


def variables_of(model):
    """The model under CTranslate2's names: query, key and value are joined, and the key has a bias of zeros."""
    state, found = dict(model.model.state_dict()), {}

    def linears(target, *names):
        weights = [state[f"{name}.weight"] for name in names]
        biases = [state.get(f"{name}.bias", torch.zeros(len(w))) for name, w in zip(names, weights, strict=True)]
        found[f"{target}/weight"], found[f"{target}/bias"] = torch.cat(weights), torch.cat([b.half() for b in biases])

    def norm(target, name):
        found[f"{target}/gamma"], found[f"{target}/beta"] = state[f"{name}.weight"], state[f"{name}.bias"]

    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = torch.tensor(getattr(model.config, f"{side}_attention_heads"), dtype=torch.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(getattr(model.config, f"{side}_layers")):
            at, to = f"{side}.layers.{layer}", f"{side}/layer_{layer}"
            norm(f"{to}/self_attention/layer_norm", f"{at}.self_attn_layer_norm")
            norm(f"{to}/ffn/layer_norm", f"{at}.final_layer_norm")
            linears(f"{to}/self_attention/linear_0", *(f"{at}.self_attn.{x}_proj" for x in "qkv"))
            linears(f"{to}/self_attention/linear_1", f"{at}.self_attn.out_proj")
            linears(f"{to}/ffn/linear_0", f"{at}.fc1")
            linears(f"{to}/ffn/linear_1", f"{at}.fc2")
            if side == "decoder":
                norm(f"{to}/attention/layer_norm", f"{at}.encoder_attn_layer_norm")
                linears(f"{to}/attention/linear_0", f"{at}.encoder_attn.q_proj")
                linears(f"{to}/attention/linear_1", *(f"{at}.encoder_attn.{x}_proj" for x in "kv"))
                linears(f"{to}/attention/linear_2", f"{at}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{part}": state[f"encoder.{conv}.{part}"] for part in ("weight", "bias")}
    return found | {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}


def written(variables, version=6):
    """The bytes of ``model.bin``."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in sorted(variables.items()):
        content = value.contiguous().numpy().tobytes()
        data += text(name) + struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
        data += struct.pack("<BI", TYPES.index(value.dtype), len(content)) + content
    return data + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


@pytest.fixture
def files(tmp_path, model):
    """``model.bin``, ``config.json`` and ``tokenizer.json`` in a folder."""
    (tmp_path / "model.bin").write_bytes(written(variables_of(model)))
    settings = {"suppress_ids": [3], "suppress_ids_begin": [2], "lang_ids": [2, 3], "alignment_heads": [[0, 1]]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    vocabulary = {f"<|{name}|>": number for number, name in enumerate(SPECIAL)}
    tokenizer = Tokenizer(BPE(vocabulary | {f"w{n}": n for n in range(len(SPECIAL), 30)}, []))
    tokenizer.add_special_tokens(list(vocabulary))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return [tmp_path / name for name in ("model.bin", "config.json", "tokenizer.json")]


def test_the_folder_loads_and_gives_the_same_logits(tool, model, files, tmp_path):
    tool.make_folder(*files, tmp_path / "folder")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "folder", dtype="auto")
    assert loaded.dtype == torch.float16
    inputs = {"input_features": torch.randn(2, 80, 24), "decoder_input_ids": torch.randint(30, (2, 5))}
    with torch.no_grad():
        assert torch.equal(loaded.float()(**inputs).logits, model.float()(**inputs).logits)
    config = loaded.generation_config
    assert config.lang_to_id == {"<|en|>": 2, "<|de|>": 3}
    assert (config.decoder_start_token_id, config.no_timestamps_token_id, config.eos_token_id) == (1, 7, 0)
    assert AutoProcessor.from_pretrained(tmp_path / "folder").feature_extractor.feature_size == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-9], "is incomplete or not a model of CTranslate2"),
        (lambda data: data + b"\0", "holds more than its variables"),
        (
            lambda data: struct.pack("<I", 5) + data[4:],
            "must be version 6 of WhisperSpec .got version 5 of 'WhisperSpec'",
        ),
        (lambda data: b"GGUF", "is incomplete or not a model of CTranslate2"),
    ],
    ids=["short", "long", "version", "other"],
)
def test_another_file_is_refused(tool, files, tmp_path, change, message):
    files[0].write_bytes(change(files[0].read_bytes()))
    with pytest.raises(SystemExit, match=message):
        tool.make_folder(*files, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_missing_weight_is_refused(tool, model, files, tmp_path):
    variables = variables_of(model)
    del variables["encoder/conv2/bias"]
    files[0].write_bytes(written(variables))
    with pytest.raises(SystemExit, match="lacks encoder/conv2/bias"):
        tool.make_folder(*files, tmp_path / "folder")
