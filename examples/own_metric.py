"""Prune with a metric of your own: any function of a weight matrix and its input statistics.

    python examples/own_metric.py MODEL --text text.txt

Prunes the model with the built-in metric ``wanda`` and with a function, and prints the error of each matrix's output.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_ext import prune_model
from ace_ext.data.windows import load_windows
from ace_ext.pruning.stages import Score
from ace_ext.pruning.statistics import LinearStatistics


def root_wanda(weight: torch.Tensor, stats: LinearStatistics) -> torch.Tensor:
    """``|W_ij| sqrt(‖X_j‖)``: Wanda's score with a weaker factor.

    ``weight`` is ``[d_out, d_in]``; ``stats.norm`` is ``‖X_j‖``, ``[d_in]`` float64. Returns ``[d_out, d_in]``; the
    weights with the highest scores are kept. A function that sets ``needs_moment = True`` on itself also gets
    ``stats.moment``.
    """
    return weight.abs().float() * stats.norm.sqrt().float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("--text", default="wiki-mini", help="calibration text: a .txt file or a name (%(default)s)")
    parser.add_argument("--pattern", default="2:4", help="N:M, N weights kept of M (%(default)s)")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration samples (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample (%(default)s)")
    args = parser.parse_args()

    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_windows(args.text, tokenizer, args.nsamples, args.seqlen, seed=0, model=dense)

    for metric in ("wanda", root_wanda):
        report = prune_model(copy.deepcopy(dense), data.tokens, method=Score(metric), pattern=args.pattern)
        errors = [matrix.relative_error for matrix in report.matrices]
        print(f"{report.config['method']:<12} mean relative error of the outputs {sum(errors) / len(errors):.4f}")


if __name__ == "__main__":
    main()
