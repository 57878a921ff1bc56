"""Makes a transformers folder of Whisper from files for CTranslate2; ``tools/fetch_models.py`` uses it.

    python tools/whisper_folder.py MODEL_BIN CONFIG_JSON TOKENIZER_JSON FOLDER

The layout of ``model.bin`` is that of CTranslate2's ``ModelSpec._serialize`` (python/ctranslate2/specs/model_spec.py),
and the names of its variables are those of ``WhisperSpec``. All numbers are little-endian:

* version (uint32), name of the specification (string), its revision (uint32)
* number of variables (uint32), then of each: name (string), rank (uint8), sizes (uint32 each), dtype (uint8), number of
  bytes (uint32), values in row-major order
* number of aliases (uint32), then of each: alias and name (strings)

A string is its length with the final zero byte (uint16), its bytes, and that byte.
"""

import argparse
import json
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from program import existing_file, one_line_errors
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

VERSION = 6
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
"""By the number in the file (CTranslate2's ``DataType``)."""
LAYER_NORMS = {
    "self_attention": "self_attn_layer_norm",
    "attention": "encoder_attn_layer_norm",
    "ffn": "final_layer_norm",
}
ATTENTIONS = {"self_attention": "self_attn", "attention": "encoder_attn"}


def _number(file: BinaryIO, code: str) -> int:
    data = file.read(struct.calcsize("<" + code))
    return struct.unpack("<" + code, data)[0]


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


def read_variables(path: Path) -> dict[str, torch.Tensor]:
    """The variables of a ``model.bin``, by name. Aliases share the tensor that they name.

    Raises SystemExit for a file of another kind or version, and for one that ends early or late.
    """
    with path.open("rb") as file:
        try:
            version, name, _ = _number(file, "I"), _string(file), _number(file, "I")
            if (version, name) != (VERSION, "WhisperSpec"):
                raise SystemExit(f"{path} must be version {VERSION} of WhisperSpec (got version {version} of {name!r})")
            variables = dict(_variable(file) for _ in range(_number(file, "I")))
            variables |= {_string(file): variables[_string(file)] for _ in range(_number(file, "I"))}
        except (struct.error, ValueError, KeyError) as error:
            raise SystemExit(f"{path} is incomplete or not a model of CTranslate2 ({error})") from None
        if file.read(1):
            raise SystemExit(f"{path} holds more than its variables")
    return variables


def _variable(file: BinaryIO) -> tuple[str, torch.Tensor]:
    name = _string(file)
    shape = [_number(file, "I") for _ in range(_number(file, "B"))]
    dtype = DTYPES[_number(file, "B")]
    values = bytearray(file.read(_number(file, "I")))
    return name, torch.frombuffer(values, dtype=dtype).view(shape)


def whisper_config(variables: dict[str, torch.Tensor], tokenizer: WhisperTokenizer) -> WhisperConfig:
    """Sizes by the shapes of the variables, ids of tokens by the vocabulary."""
    layers = {side: _layers(variables, side) for side in ("encoder", "decoder")}
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    inner = {side: variables[f"{side}/layer_0/ffn/linear_0/weight"].shape[0] for side in layers}
    heads = {side: int(variables[f"{side}/num_heads"]) for side in layers}
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    return WhisperConfig(
        vocab_size=vocabulary, num_mel_bins=variables["encoder/conv1/weight"].shape[1], d_model=width,
        encoder_layers=layers["encoder"], encoder_attention_heads=heads["encoder"], encoder_ffn_dim=inner["encoder"],
        decoder_layers=layers["decoder"], decoder_attention_heads=heads["decoder"], decoder_ffn_dim=inner["decoder"],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, begin_suppress_tokens=None,
    )  # fmt: skip


def _layers(variables: dict[str, torch.Tensor], side: str) -> int:
    return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)


def state_dict(variables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under their names in ``WhisperForConditionalGeneration``.

    CTranslate2 joins the rows of query, key and value. Whisper's key has no bias, so zeros stand there and are dropped.
    """
    found: dict[str, torch.Tensor] = {}
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        _norm(found, f"model.{side}.layer_norm", variables, f"{side}/layer_norm")
        for layer in range(_layers(variables, side)):
            _layer(found, f"model.{side}.layers.{layer}", variables, f"{side}/layer_{layer}")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"model.encoder.{conv}.{part}"] = variables[f"encoder/{conv}/{part}"]
    found["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    return found


def _norm(found: dict[str, torch.Tensor], name: str, variables: dict[str, torch.Tensor], source: str) -> None:
    found[f"{name}.weight"], found[f"{name}.bias"] = variables[f"{source}/gamma"], variables[f"{source}/beta"]


def _layer(found: dict[str, torch.Tensor], name: str, variables: dict[str, torch.Tensor], source: str) -> None:
    """One block: its attentions, the two linear layers after them, and a layer norm before each."""
    for part, norm in LAYER_NORMS.items():
        if f"{source}/{part}/layer_norm/gamma" in variables:
            _norm(found, f"{name}.{norm}", variables, f"{source}/{part}/layer_norm")
    for number, linear in enumerate(("fc1", "fc2")):
        for part in ("weight", "bias"):
            found[f"{name}.{linear}.{part}"] = variables[f"{source}/ffn/linear_{number}/{part}"]
    for part, attention in ATTENTIONS.items():
        at = f"{source}/{part}/linear_"
        if f"{at}0/weight" not in variables:
            continue
        joined = [f"{at}{number}" for number in range(2 if part == "attention" else 1)]
        weights = torch.cat([variables[f"{linear}/weight"] for linear in joined]).chunk(3)
        biases = torch.cat([variables[f"{linear}/bias"] for linear in joined]).chunk(3)
        for projection, weight, bias in zip("qkv", weights, biases, strict=True):
            found[f"{name}.{attention}.{projection}_proj.weight"] = weight.contiguous()
            if projection != "k":
                found[f"{name}.{attention}.{projection}_proj.bias"] = bias.contiguous()
        for kind in ("weight", "bias"):
            found[f"{name}.{attention}.out_proj.{kind}"] = variables[f"{at}{len(joined)}/{kind}"]


def generation_config(settings: dict[str, list], tokenizer: WhisperTokenizer, positions: int) -> GenerationConfig:
    """How to generate, by ``settings``, CTranslate2's ``config.json``; other ids follow from the vocabulary."""
    ids = tokenizer.convert_tokens_to_ids
    start, end = ids("<|startoftranscript|>"), ids("<|endoftext|>")
    return GenerationConfig(
        max_length=positions, decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        is_multilingual=True, task_to_id={task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
        lang_to_id=dict(zip(tokenizer.convert_ids_to_tokens(settings["lang_ids"]), settings["lang_ids"], strict=True)),
        no_timestamps_token_id=ids("<|notimestamps|>"), prev_sot_token_id=ids("<|startofprev|>"),
        suppress_tokens=settings["suppress_ids"], begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"], return_timestamps=False, max_initial_timestamp_index=50,
    )  # fmt: skip


def make_folder(binary: Path, settings: Path, tokenizer_json: Path, folder: Path) -> None:
    """Writes ``WhisperForConditionalGeneration`` with its processor into ``folder``; every weight must be there."""
    variables = read_variables(binary)
    try:
        tokenizer = WhisperTokenizer(tokenizer_file=str(tokenizer_json))
    except Exception as error:  # the library tokenizers has no class of its own
        raise SystemExit(f"{tokenizer_json} is not a tokenizer of transformers ({error})") from None
    try:
        weights, config = state_dict(variables), whisper_config(variables, tokenizer)
    except KeyError as error:
        raise SystemExit(f"{binary} lacks {error.args[0]}") from None
    try:
        generation = generation_config(json.loads(settings.read_text()), tokenizer, config.max_target_positions)
    except (ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"{settings} is not the config.json of CTranslate2's Whisper ({error!r})") from None
    model = WhisperForConditionalGeneration(config).to(weights["model.decoder.embed_tokens.weight"].dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # tied to the embeddings
        raise SystemExit(f"{binary} lacks {missing} or has too many: {unexpected}")
    model.generation_config = generation
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model_bin", "config_json", "tokenizer_json"):
        parser.add_argument(name, type=existing_file)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(f"folder {str(args.folder)!r} exists and is not empty; give another name")
    with one_line_errors(parser):
        make_folder(args.model_bin, args.config_json, args.tokenizer_json, args.folder)


if __name__ == "__main__":
    main()
