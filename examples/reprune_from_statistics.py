"""Collect statistics once, then prune the model at several sparsities without another forward pass.

    python examples/reprune_from_statistics.py MODEL --text text.txt --output folder

Writes ``folder/statistics.zip``, and one pruned model for each sparsity or pattern. These are the commands
``ace-prune run --save-stats FILE`` and ``ace-prune run --stats FILE``, called from Python.
"""

import argparse
from pathlib import Path

from ace_ext.cli.main import main as ace_prune


def run(*arguments: object) -> None:
    """Calls ``ace-prune run`` in this process; a message is on stderr already where it does not return 0."""
    status = ace_prune(["run", *map(str, arguments)])
    if status:
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("--text", default="wiki-mini", help="calibration text: a .txt file or a name (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the file and the models")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample (%(default)s)")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    statistics = args.output / "statistics.zip"
    # Statistics of the dense model serve every sparsity, and every method that needs no others.
    common = ["--model", args.model, "--method", "fast"]
    text = ["--calibration", args.text, "--nsamples", args.nsamples, "--seqlen", args.seqlen]

    run(*common, *text, "--sparsity", 0.5, "--save-stats", statistics, "--output", args.output / "sparsity-0.5")
    run(*common, "--sparsity", 0.6, "--stats", statistics, "--output", args.output / "sparsity-0.6")
    run(*common, "--pattern", "2:4", "--stats", statistics, "--output", args.output / "pattern-2-4")


if __name__ == "__main__":
    main()
