"""Perplexity of pruned models: metrics x orders x seeds x calibration texts x evaluation texts, one line each.

    python benchmarks/quality.py --model MODEL --metrics wanda,ace --seeds 0,1,2 --calibration wiki-mini,news-mini

The dense model is loaded once; each run starts from its weights. Prints device, dtype and settings first; the lines are
tab-separated, so that they can be pasted into a sheet. The last column is the ratio to the first metric of the list.
"""

import argparse
import itertools
import time

import torch

from ace_ext.calibration import evaluation_tokens, load_windows
from ace_ext.checkpoint import load_model
from ace_ext.cli import pick_device
from ace_ext.config import PruneConfig
from ace_ext.driver import prune_model
from ace_ext.evaluate import perplexity


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--metrics", default="wanda,ace")
    parser.add_argument("--orders", default="sequential")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--texts", default="wiki-mini")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--pattern")
    parser.add_argument("--group", default="row")
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--eval-seqlen", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    loaded = load_model(args.model, args.dtype, pick_device(args.device))
    model = loaded.model
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    texts = {text: evaluation_tokens(text, loaded.tokenizer) for text in args.texts.split(",")}
    size = args.eval_seqlen * args.eval_windows

    def evaluate() -> dict[str, float]:
        return {text: perplexity(model, ids, args.eval_seqlen, size).perplexity for text, ids in texts.items()}

    first = next(model.parameters())
    print(
        f"{args.model.rsplit('/', 1)[-1]}, {first.dtype}, {first.device}, torch {torch.__version__}: "
        f"{args.nsamples} x {args.seqlen} tokens, {args.pattern or args.sparsity or 0.5}, group {args.group}; "
        f"perplexity over {args.eval_windows} windows of {args.eval_seqlen}"
    )
    for text, value in evaluate().items():
        print(f"dense\t\t\t\t{text}\t{value:.2f}", flush=True)
    baseline: dict[tuple, float] = {}
    metrics = args.metrics.split(",")
    for calibration, seed in itertools.product(args.calibration.split(","), map(int, args.seeds.split(","))):
        data = load_windows(calibration, loaded.tokenizer, args.nsamples, args.seqlen, seed, model=model)
        for order, metric in itertools.product(args.orders.split(","), metrics):
            model.load_state_dict(dense)
            config = PruneConfig(
                metric, args.sparsity, args.pattern, args.group, order=order, batch_tokens=args.batch_tokens
            )
            start = time.perf_counter()
            prune_model(model, data.tokens, config)
            seconds = time.perf_counter() - start
            for text, value in evaluate().items():
                ratio = value / baseline.setdefault((calibration, seed, order, text), value)
                line = (
                    metric,
                    order,
                    f"seed {seed}",
                    calibration,
                    text,
                    f"{value:.2f}",
                    f"{seconds:.0f} s",
                    f"{ratio:.3f}",
                )
                print("\t".join(line), flush=True)
        model.load_state_dict(dense)


if __name__ == "__main__":
    main()
