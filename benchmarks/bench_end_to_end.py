#!/usr/bin/env python3
"""The pruning loop against Wanda's order of work and against a plain forward, in one process, on one model.

    python benchmarks/bench_end_to_end.py --model MODEL [--nsamples 64 --seqlen 128] [--repeats 3] [--perplexity]

For each method: seconds (the least of the repeats, which take turns), the ratio to Wanda's order of work, and the ratio
to one plain forward of the same tokens through the same blocks; with ``--perplexity`` also the perplexity of the pruned
model. Wanda's order of work is implemented here: for each block a forward with hooks that sum squares of the inputs,
for each Linear a stable sort of every row, a scatter and an index assignment, and a second forward. With every method
all tokens go through a block at once, so that no method has an advantage from larger batches.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ace_ext import PruneConfig, prune_model
from ace_ext.compare.bench import restore
from ace_ext.data.bos import choose_bos
from ace_ext.data.perplexity import perplexity
from ace_ext.data.windows import evaluation_tokens, load_windows
from ace_ext.engine.devices import pick_device
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.pruning.method import parse

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, one_line_errors


@torch.no_grad()
def forward_blocks(model: nn.Module, tokens: Tensor) -> None:
    blocks = find_blocks(model)
    (call,) = capture_calls(model, blocks, [{"input_ids": tokens}])
    hidden = call.hidden
    for index, block in enumerate(blocks):
        hidden = run_block(block, hidden, call.others[index])


@torch.no_grad()
def wanda_order(model: nn.Module, tokens: Tensor, sparsity: float) -> None:
    """Two forwards per block and sorted masks, as in Wanda (arXiv 2306.11695), but on all samples at once."""
    blocks = find_blocks(model)
    (call,) = capture_calls(model, blocks, [{"input_ids": tokens}])
    hidden = call.hidden
    for index, block in enumerate(blocks):
        squares: dict[str, Tensor] = {}

        def note(child: str, x: Tensor, squares=squares) -> None:
            squares[child] = torch.norm(x.reshape(-1, x.shape[-1]).t().float(), dim=1) ** 2 / tokens.shape[0]

        handles = [
            linear.register_forward_hook(lambda _, args, out, child=child, note=note: note(child, args[0]))
            for child, linear in block.linears.items()
        ]
        run_block(block, hidden, call.others[index])
        for handle in handles:
            handle.remove()
        for child, linear in block.linears.items():
            weight = linear.weight
            metric = torch.abs(weight) * torch.sqrt(squares[child].reshape(1, -1))
            mask = torch.zeros_like(metric, dtype=torch.bool)
            indices = torch.sort(metric, dim=-1, stable=True)[1][:, : int(metric.shape[1] * sparsity)]
            mask.scatter_(1, indices, True)
            weight[mask] = 0
        hidden = run_block(block, hidden, call.others[index])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--nsamples", type=count, default=64)
    parser.add_argument("--seqlen", type=count, default=128)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--perplexity", action="store_true", help="also evaluate on 24 held-out windows of 512")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    loaded = load_model(args.model, args.dtype, device)
    model = loaded.model
    data = load_windows(args.calibration, loaded.tokenizer, args.nsamples, args.seqlen, 0, model=model)
    tokens, bos = data.tokens, choose_bos("auto", loaded.tokenizer, model).token
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}

    def ours(method: str, **options) -> Callable[[], None]:
        method = parse(method).collected(batch_tokens=tokens.numel(), **options)
        config = PruneConfig(method, args.sparsity)
        return lambda: prune_model(model, tokens, config)

    ways: dict[str, Callable[[], None]] = {
        "plain forward": lambda: forward_blocks(model, tokens.to(device)),
        "Wanda's order of work": lambda: wanda_order(model, tokens.to(device), args.sparsity),
        "wanda, block": ours("wanda", order="block"),
        "wanda, sequential": ours("wanda"),
        "norm-cosvar, exact norms": ours("norm-cosvar", token_norm="exact"),
        "norm-cosvar, sketched norms": ours("norm-cosvar", token_norm="sketch"),
        "fast": ours("fast"),
        "balanced": ours("balanced"),
    }
    seconds = {name: [] for name in ways}
    quality: dict[str, float] = {}
    text = evaluation_tokens("wiki-mini", loaded.tokenizer) if args.perplexity else None
    for repeat in range(args.repeats + 1):  # the first round warms up
        for name, way in ways.items():
            restore(model, dense)
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            elif text is not None:
                quality[name] = perplexity(model, text, 512, 24 * 512, bos=bos).perplexity
    print(
        f"{next(model.parameters()).dtype}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{args.nsamples} x {args.seqlen} tokens, sparsity {args.sparsity}, least of {args.repeats}"
        + ("" if device.type == "cuda" else "  (CPU figures: not run on a GPU)")
    )
    least = {name: min(times) for name, times in seconds.items()}
    for name, value in least.items():
        against_wanda, against_forward = value / least["Wanda's order of work"], value / least["plain forward"]
        shown = f"   perplexity {quality[name]:.2f}" if name in quality else ""
        print(f"{name:<33}{value:7.2f} s   {against_wanda:5.2f} of Wanda   {against_forward:5.2f} forwards{shown}")


if __name__ == "__main__":
    main()
