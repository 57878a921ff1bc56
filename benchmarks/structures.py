"""Perplexity of a model without some of its structures.

    python benchmarks/structures.py --model MODEL "neurons=0.2" "neurons=0.2(score=variance)" "params=0.2"
    python benchmarks/structures.py --model MODEL --method distill "neurons=0.2"
    python benchmarks/structures.py --model MODEL --setting mlp_bias "neurons=0.2(score=published-flap)" "neurons=0.2"

Each row removes the structures from a copy of the model in memory, and evaluates it on three texts. The last column is
the processor's time of the removal, and of the method after it. ``--setting`` gives the model biases of zero, where a
class has such a setting: FLAP updates biases.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from ace_ext import prune_model
from ace_ext.data.bos import choose_bos
from ace_ext.data.evaluation import text_perplexity
from ace_ext.data.windows import load_windows
from ace_ext.engine.distillation import distill_draw
from ace_ext.errors import InputError
from ace_ext.models.loading import LoadedModel, load_model
from ace_ext.pruning.config import PruneConfig
from ace_ext.structures.smaller import fill_, laid_out, stored_shapes, take_over_

TEXTS = ("wiki-mini", "news-mini", "code-mini")


def perplexity(loaded: LoadedModel, model: nn.Module, windows: int, bos: bool) -> list[float]:
    """One figure for each text."""
    texts = (text_perplexity(model, loaded.tokenizer, text, 512, max_tokens=windows * 512, bos=bos) for text in TEXTS)
    return [found.perplexity for found in texts]


def add_biases_(model: nn.Module, setting: str) -> None:
    """Switches a setting of the configuration on. What the class then has more is zero."""
    larger, dtype = laid_out(model, {setting: True}), next(model.parameters()).dtype
    new = {name: torch.zeros(shape, dtype=dtype) for name, shape in stored_shapes(larger).items()}
    fill_(larger, new | model.state_dict(), model)
    take_over_(model, larger)


def row(part: str, figures: list[float], share: float = 0.0, seconds: float = 0.0) -> str:
    """A line of the table."""
    values = " | ".join(f"{value:.2f}" for value in [*figures, statistics.geometric_mean(figures)])
    return f"| `{part}` | {share:.1%} | {values} | {seconds:.0f} |"


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", help="what to remove, one row each")
    parser.add_argument("--model", required=True, help="a model folder or a GGUF file")
    parser.add_argument("--method", help="what follows the removal, such as distill")
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-windows", type=int, default=12)
    parser.add_argument("--setting", help="of the configuration, which gives biases of zero, such as mlp_bias")
    arguments = parser.parse_args(argv)
    try:
        for part in arguments.parts:  # all of them before the first is measured
            PruneConfig(arguments.method, remove=part)
        loaded = load_model(arguments.model, "bfloat16")
    except InputError as error:
        parser.error(str(error))
    if arguments.setting is not None:
        add_biases_(loaded.model, arguments.setting)
    bos = choose_bos("auto", loaded.tokenizer, loaded.model)

    def windows(nsamples: int, seed: int):
        text = (arguments.calibration, loaded.tokenizer)
        return load_windows(*text, nsamples=nsamples, seqlen=arguments.seqlen, seed=seed, model=loaded.model).tokens

    print(f"{Path(arguments.model).name}, calibrated on {arguments.nsamples} x {arguments.seqlen} tokens\n")
    print(f"| removed | parameters | {' | '.join(TEXTS)} | mean | CPU s |\n|---|--:|{'--:|' * (len(TEXTS) + 2)}")
    print(row("dense", perplexity(loaded, loaded.model, arguments.eval_windows, bos)), flush=True)
    for part in arguments.parts:
        model = copy.deepcopy(loaded.model)
        config = PruneConfig(arguments.method, remove=part)
        more = {}
        if config.method.distill is not None:
            more["distill_text"] = windows(*distill_draw(config, arguments.seqlen, arguments.seed))
        start = time.process_time()
        report = prune_model(model, windows(arguments.nsamples, arguments.seed), config, **more)
        seconds = time.process_time() - start
        taken = 1 - report.removed[-1].parameters_after / report.removed[0].parameters_before
        chosen = " + ".join(record.part for record in report.removed)
        shown = part if chosen == part else f"{part}: {chosen}"
        print(row(shown, perplexity(loaded, model, arguments.eval_windows, bos), taken, seconds), flush=True)


if __name__ == "__main__":
    main()
