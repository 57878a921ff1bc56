"""Prune a model from Python: load it, prune it in place, look at the report, save it.

    python examples/prune_from_python.py MODEL --text text.txt --output pruned

MODEL is a folder or a hub name. The output is a folder that ``transformers`` loads like any other model
and ``ace-prune verify`` checks. The command
``ace-prune run`` does the same and more (resume, memory limit, GGUF); use Python where the model is in memory already.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_ext import prune_model
from ace_ext.data.windows import load_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("--text", default="wiki-mini", help="calibration text: a .txt file or a name (%(default)s)")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of zeros (%(default)s)")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample (%(default)s)")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = load_windows(args.text, tokenizer, args.nsamples, args.seqlen, seed=0, model=model)

    report = prune_model(
        model,
        data.tokens,
        method="fast",
        sparsity=args.sparsity,
        callback=lambda block: print(block.name, f"{block.seconds:.2f} s"),
    )

    print(report.table())
    worst = max(report.matrices, key=lambda matrix: matrix.relative_error)
    print(f"largest relative error: {worst.relative_error:.3f} in {worst.name}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report.save(args.output)  # for ace-prune verify and pack, and for heal with --dense


if __name__ == "__main__":
    main()
