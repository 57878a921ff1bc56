"""Where the time of a decoding step goes: products with packed matrices, the LM head, and all the rest.

    python benchmarks/decode_step.py DENSE PACKED [--tokens 32]

Both models decode the same tokens alternately, batch 1, one token a call. Clocks around each Linear give the two
products; the rest is the step less these: attention, norms, and Python. Prints milliseconds a token and shares.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ace_ext
from ace_ext.models._transformers import cache_arguments, output_head
from ace_ext.runtime import PackedLinear

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, existing_folder, one_line_errors

BLOCKS, HEAD, REST = "Linears of the blocks", "LM head", "the rest"


class Clocks:
    """Seconds in the Linears of a model, added up by part."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        head = output_head(model)
        for module in model.modules():
            if isinstance(module, nn.Linear | PackedLinear):
                self._watch(module, HEAD if module is head else BLOCKS)

    def _watch(self, module: nn.Module, part: str) -> None:
        def started(*_: object) -> None:
            self.seconds[part] -= time.perf_counter()

        def ended(*_: object) -> None:
            self.seconds[part] += time.perf_counter()

        module.register_forward_pre_hook(started)
        module.register_forward_hook(ended)


def step_times(model: nn.Module, clocks: Clocks, tokens: Tensor) -> dict[str, float]:
    """Milliseconds a token of each part; the first token, which fills the cache, is not counted."""
    output = model(tokens[:, :1], use_cache=True)
    clocks.seconds.clear()
    start = time.perf_counter()
    for at in range(1, tokens.shape[1]):
        output = model(tokens[:, at : at + 1], use_cache=True, **cache_arguments(output))
    whole = time.perf_counter() - start
    parts = {BLOCKS: clocks.seconds[BLOCKS], HEAD: clocks.seconds[HEAD]}
    parts[REST] = whole - sum(parts.values())
    return {part: 1e3 * seconds / (tokens.shape[1] - 1) for part, seconds in parts.items()}


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=existing_folder)
    parser.add_argument("packed", type=existing_folder)
    parser.add_argument("--tokens", type=count, default=32)
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        print_parts(args)


def print_parts(args: argparse.Namespace) -> None:
    """Measures both models, and prints a line for each."""
    models = {
        "dense": AutoModelForCausalLM.from_pretrained(args.dense, dtype="auto").eval(),
        "packed": ace_ext.load_packed(args.packed),
    }
    clocks = {name: Clocks(model) for name, model in models.items()}
    tokens = torch.randint(models["dense"].config.vocab_size, (1, args.tokens + 1))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(6):
            for name, model in models.items():
                found = step_times(model, clocks[name], tokens)
                if number:  # the first round is not counted
                    rounds[name].append(found)
    print(f"{torch.get_num_threads()} threads, medians of 5 rounds, milliseconds a token (share)")
    for name, found in rounds.items():
        parts = {part: statistics.median(one[part] for one in found) for part in (BLOCKS, HEAD, REST)}
        whole = sum(parts.values())
        print(f"{name}: {whole:.2f}; " + ", ".join(f"{p} {ms:.2f} ({ms / whole:.0%})" for p, ms in parts.items()))


if __name__ == "__main__":
    main()
