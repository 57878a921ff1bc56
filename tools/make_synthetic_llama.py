"""Writes a sharded Llama with random weights, one shard at a time, so that it needs the memory of one block only.

    python tools/make_synthetic_llama.py FOLDER --layers 11 --hidden 4096 --intermediate 11008

It also writes a word-level tokenizer and ``text.txt``, a text for it. Weights are bfloat16, embeddings are tied.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

WORDS = "the quick brown fox jumps over the lazy dog"
VOCABULARY = 64


def make(folder: Path, layers: int, hidden: int, intermediate: int, seed: int = 0) -> int:
    """Writes the model; returns the bytes of all weights. Each block is a shard, embedding and last norm another."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    _save_tokenizer(folder)
    (folder / "text.txt").write_text(f"{WORDS} " * 400)
    random = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    for number, tensors in enumerate(_shards(layers, hidden, intermediate, random)):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(layers: int, hidden: int, intermediate: int, random: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def draw(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=random).mul_(cols**-0.5).bfloat16()

    def norm() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    yield {"model.embed_tokens.weight": draw(VOCABULARY, hidden), "model.norm.weight": norm()}
    for layer in range(layers):
        tensors = {f"self_attn.{name}_proj.weight": draw(hidden, hidden) for name in "qkvo"}
        tensors |= {f"mlp.{name}_proj.weight": draw(intermediate, hidden) for name in ("gate", "up")}
        tensors["mlp.down_proj.weight"] = draw(hidden, intermediate)
        tensors |= {"input_layernorm.weight": norm(), "post_attention_layernorm.weight": norm()}
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=["<pad>", "<s>", "</s>", "<unk>"]))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--intermediate", type=int, default=11008)
    args = parser.parse_args(argv)
    for name, multiple in {"layers": 1, "hidden": 128, "intermediate": 1}.items():
        value = getattr(args, name)
        if value < 1 or value % multiple:
            parser.error(f"--{name} must be a multiple of {multiple} above 0 (got {value})")
    if args.folder.is_dir() and any(args.folder.iterdir()):  # shards of another model would stay beside the new ones
        parser.error(f"folder {str(args.folder)!r} holds files; give another name, or empty it")
    try:
        size = make(args.folder, args.layers, args.hidden, args.intermediate)
    except OSError as error:
        parser.error(f"folder {str(args.folder)!r} cannot be written: {error.strerror}")
    print(f"{args.folder}: {size / 1e9:.2f} GB in {args.layers + 1} shards")


if __name__ == "__main__":
    main()
