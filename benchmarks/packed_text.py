"""Compares what a packed model and its dense one write, word for word, and how far each is from float32.

    python benchmarks/packed_text.py DENSE PACKED

Greedy decoding of 48 tokens from six beginnings, in the dtype of the folder and in float32 (both models cast), and by
the dense model alone with and without its cache of keys and values: how often rounding alone changes a text. Then the
error of the logits of a sentence, read at once and token by token, relative to the dense model in float32.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ace_ext
from ace_ext.models._transformers import cache_arguments

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import existing_folder, one_line_errors

BEGINNINGS = (
    "The history of bridges begins with",
    "In 1969 the first people landed on the",
    "Water is a molecule that",
    "def fibonacci(n):",
    "The capital of France is",
    "Once upon a time there was a",
)
SENTENCE = (
    "The old river in the north of the country, where people have lived for a long time, is known for its bridges."
)


def token_by_token(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids[:, :1], use_cache=True)
    logits = [output.logits]
    for at in range(1, ids.shape[1]):
        output = model(ids[:, at : at + 1], use_cache=True, **cache_arguments(output))
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=existing_folder)
    parser.add_argument("packed", type=existing_folder)
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype="auto").eval()
    packed = ace_ext.load_packed(args.packed)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    name = str(dense.dtype).removeprefix("torch.")
    with torch.inference_mode():
        logits = {
            f"{kind} {name}, {how}": read(ids)
            for kind, model in (("dense", dense), ("packed", packed))
            for how, read in (
                ("at once", lambda x, m=model: m(x).logits.float()),
                ("token by token", lambda x, m=model: token_by_token(m, x).float()),
            )
        }
        own, count = texts(dense, tokenizer), len(BEGINNINGS)
        print(f"{name}: {same(own, texts(packed, tokenizer))} of {count} texts are the same")
        print(f"{name}, dense without its cache: {same(own, texts(dense, tokenizer, use_cache=False))} of {count}")
        dense, packed = dense.float(), packed.float()
        print(f"float32: {same(texts(dense, tokenizer), texts(packed, tokenizer))} of {count} texts are the same")
        exact = dense(ids).logits
        logits["packed float32, token by token"] = token_by_token(packed, ids)
        for what, found in logits.items():
            print(f"{what:32} error of logits {((found - exact).square().mean().sqrt() / exact.std()).item():.2e}")


def texts(model: nn.Module, tokenizer, use_cache: bool = True) -> list[Tensor]:
    inputs = [tokenizer(text, return_tensors="pt") for text in BEGINNINGS]
    return [model.generate(**given, max_new_tokens=48, do_sample=False, use_cache=use_cache) for given in inputs]


def same(texts: list[Tensor], others: list[Tensor]) -> int:
    return sum(map(torch.equal, texts, others))


if __name__ == "__main__":
    main()
