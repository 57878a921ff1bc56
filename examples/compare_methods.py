"""Compare two methods on one model: perplexity at two sparsities, mean and spread over three seeds.

    python examples/compare_methods.py MODEL --text text.txt --held-out other.txt

The dense model is loaded once; its weights are put back before each run. ``ace-prune compare`` does the same from the
command line, records each finished run in a folder, and goes on from there when it is called again.
"""

import argparse

import torch

from ace_ext.compare.grid import Evaluation, Grid, Study
from ace_ext.compare.runner import run_study
from ace_ext.compare.tables import rows, text_table
from ace_ext.pruning.method import parse_list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a .gguf file or a hub name")
    parser.add_argument("--text", default="wiki-mini", help="calibration text: a .txt file or a name (%(default)s)")
    parser.add_argument("--held-out", default="wiki-mini", help="text to evaluate on, not --text's file (%(default)s)")
    parser.add_argument("--methods", default="wanda; ace", help="two or more, separated by ; (%(default)s)")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration samples (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample (%(default)s)")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens of a window (%(default)s)")
    args = parser.parse_args()

    study = Study(
        model=args.model,
        grid=Grid(
            methods=parse_list(args.methods),
            amounts=("0.5", "0.6"),
            lengths=((args.nsamples, args.seqlen),),
            calibrations=(args.text,),
            seeds=(0, 1, 2),
        ),
        evaluation=Evaluation(texts=(args.held_out,), seqlen=args.eval_seqlen),
    )
    results = run_study(study, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(text_table(results))

    best = min(rows(results), key=lambda row: row.perplexity[args.held_out].mean)
    print(f"lowest: {best.method} at {best.amount_name}, perplexity {best.perplexity[args.held_out]}")


if __name__ == "__main__":
    main()
