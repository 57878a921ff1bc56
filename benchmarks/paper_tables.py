"""The settings of the ACE paper (arXiv 2505.21987) as named experiments, one command each, with the published figures.

    python benchmarks/paper_tables.py --list
    python benchmarks/paper_tables.py --run llama-2-7b-ctx4096 --model FOLDER --output results/llama-2-7b-ctx4096
    python benchmarks/paper_tables.py --table results

Needs the models' weights, a GPU that holds them, and network access for WikiText-2 and C4 (or local files instead).
An experiment is a grid of ``ace-prune compare``: all methods at 50 %, 60 %, 2:4 and 4:8, each calibrated on 128 samples
of 32, 128, 512 and 2048 tokens. A second call continues from the contents of its output folder. Published figures are
from the sources named with them. A cell is empty if there is no published figure, or if it was not run.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ace_ext.cli.compare import parse_length
from ace_ext.compare.grid import Evaluation, Grid, Study
from ace_ext.compare.journal import RUNS_NAME, Results, read_results
from ace_ext.compare.runner import run_study
from ace_ext.compare.tables import amount_name, rows
from ace_ext.engine.devices import pick_device
from ace_ext.errors import InputError
from ace_ext.pruning.method import parse_list
from ace_ext.reporting.compare_page import write_study_report
from ace_ext.reporting.plots import require_matplotlib

MODELS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b")},
}
"""The models: short name and hub name."""

LONG_CONTEXT = ("llama-2-7b", "llama-2-13b", "llama-3-8b")
"""Models with positions for windows of 4096 tokens; all have 2048."""

AMOUNTS = ("0.5", "0.6", "2:4", "4:8")
LENGTHS = ("128x32", "128x128", "128x512", "128x2048")
RIA_METHOD = "collect(order=block) + ria"
GROUPS = {"magnitude": "matrix", RIA_METHOD: "matrix"}
"""Methods whose published code compares the weights of a matrix with each other."""
METHODS = "; ".join(
    [
        "magnitude",
        "published-sparsegpt",
        "published-wanda",
        "published-admm",
        "published-alps",
        "published-dsnot",
        "published-thanos",
        RIA_METHOD,
        "ace",
        "norm-cosvar",
        "fast",
        "balanced",
        "better",
        "best",
    ]
)
ALL_WINDOWS = 10**6  # more than any text here has, so that whole texts are read, as for published figures

WANDA = "README of github.com/locuslab/wanda, context 4096"
RIA = (
    "README of github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning; "
    "it does not say the context: 2048 is its program's default"
)


@dataclass(frozen=True)
class Published:
    """A perplexity on WikiText-2 as its source prints it, by ``(method, amount)``; dense is ``("dense", "")``."""

    source: str
    figures: dict[tuple[str, str], float]


PUBLISHED = {
    "llama-2-7b-ctx4096": Published(
        WANDA,
        {
            ("dense", ""): 5.12,
            ("magnitude", "0.5"): 14.89,
            ("published-sparsegpt", "0.5"): 6.51,
            ("published-wanda", "0.5"): 6.42,
            ("magnitude", "4:8"): 16.48,
            ("published-sparsegpt", "4:8"): 8.12,
            ("published-wanda", "4:8"): 7.97,
            ("magnitude", "2:4"): 54.59,
            ("published-sparsegpt", "2:4"): 10.17,
            ("published-wanda", "2:4"): 11.02,
        },
    ),
    "llama-3-8b-ctx2048": Published(
        RIA,
        {
            ("dense", ""): 6.14,
            ("published-wanda", "0.5"): 10.82,
            ("published-sparsegpt", "0.5"): 9.40,
            (RIA_METHOD, "0.5"): 9.34,
            ("published-wanda", "2:4"): 24.18,
            ("published-sparsegpt", "2:4"): 16.26,
            (RIA_METHOD, "2:4"): 23.08,
        },
    ),
}


@dataclass(frozen=True)
class Experiment:
    """A model on WikiText-2 with evaluation windows of ``context`` tokens."""

    name: str
    hub_name: str
    context: int


EXPERIMENTS = {
    f"{model}-ctx{context}": Experiment(f"{model}-ctx{context}", hub_name, context)
    for model, hub_name in MODELS.items()
    for context in ((2048, 4096) if model in LONG_CONTEXT else (2048,))
}


def study_of(experiment: Experiment, args: argparse.Namespace) -> Study:
    """The experiment's grid, on the weights and texts of the command line."""
    return Study(
        model=args.model,
        grid=Grid(
            methods=parse_list(args.methods),
            amounts=tuple(args.amounts.split(",")),
            lengths=tuple(map(parse_length, args.lengths.split(","))),
            calibrations=(args.calibration,),
            seeds=tuple(map(int, args.seeds.split(","))),
        ),
        # As the published figures were measured: of their windows only the first begins with BOS.
        evaluation=Evaluation((args.text,), args.context or experiment.context, args.eval_windows, bos="never"),
        dtype=args.dtype,
        groups=GROUPS,
    )


def table(name: str, results: Results | None) -> str:
    """Markdown: a line for each method and amount, the published figure, then the measured one for each length."""
    published = PUBLISHED.get(name, Published("", {}))
    measured = {(row.method, row.amount, row.length): row for row in rows(results)} if results else {}
    lengths = list(dict.fromkeys(length for *_, length in measured)) or list(LENGTHS)
    dense = [f"{figures.perplexity:.2f}" for figures in results.dense.values()] if results else [""]
    keys = dict.fromkeys([*[key for key in published.figures if key[0] != "dense"], *[key[:2] for key in measured]])
    lines = [
        ["method", "zeros", "published", *[f"measured, {length}" for length in lengths]],
        ["---", "---", "--:", *["--:" for _ in lengths]],
        ["dense", "0 %", _figure(published, ("dense", "")), *[dense[0] for _ in lengths]],
    ]
    for method, amount in keys:
        found = [measured.get((method, amount, length)) for length in lengths]
        figures = ["" if row is None else str(next(iter(row.perplexity.values()))) for row in found]
        lines.append([method, amount_name(amount), _figure(published, (method, amount)), *figures])
    text = [f"### {name}: perplexity on {_text_name(results)}", "", *["| " + " | ".join(line) + " |" for line in lines]]
    if published.source:
        text += ["", f"Published: {published.source}; calibrated on 128 samples as long as the context."]
    return "\n".join(text)


def _text_name(results: Results | None) -> str:
    return "wikitext2" if results is None else Path(next(iter(results.settings["texts"]))).name


def _figure(published: Published, key: tuple[str, str]) -> str:
    return f"{published.figures[key]:.2f}" if key in published.figures else ""


def run(experiment: Experiment, args: argparse.Namespace) -> str:
    """Runs the missing cells of an experiment and returns its table."""
    if args.model is None:
        raise InputError(f"--run needs --model: a folder with {experiment.hub_name}, or that name")
    study = study_of(experiment, args)
    require_matplotlib()
    output = Path(args.output or Path("results") / experiment.name)
    results = run_study(study, pick_device(args.device), output, progress=sys.stderr.isatty())
    write_study_report(results, output)
    return table(experiment.name, results)


def tables(folder: Path) -> str:
    """The table of every experiment: published figures, and the results in ``folder/NAME``."""
    if not folder.is_dir():
        raise InputError(f"--table {str(folder)!r} is not a folder; give the one that holds the outputs of --run")
    found = {name: folder / name / RUNS_NAME for name in EXPERIMENTS}
    return "\n\n".join(table(name, read_results(path) if path.is_file() else None) for name, path in found.items())


def experiment_list() -> str:
    """A line for each experiment, and the settings that all share."""
    width = max(map(len, EXPERIMENTS))
    lines = [f"{e.name:<{width}}  {e.hub_name}, windows of {e.context}" for e in EXPERIMENTS.values()]
    zeros = ", ".join(map(amount_name, AMOUNTS))
    return "\n".join([*lines, "", f"each: {zeros}; calibrated on c4, {', '.join(LENGTHS)}; {METHODS}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the experiments' names")
    what.add_argument("--run", choices=EXPERIMENTS, metavar="NAME", help="one experiment; needs --model")
    what.add_argument("--table", metavar="FOLDER", help="all tables, from the outputs FOLDER/NAME")
    parser.add_argument("--model", help="a folder with the weights, or a hub name")
    parser.add_argument("--output", metavar="DIR", help="default: results/NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--calibration", default="c4", help="or a local file (default: %(default)s)")
    parser.add_argument("--text", default="wikitext2", help="or a local file (default: %(default)s)")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--amounts", default=",".join(AMOUNTS))
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--context", type=int, help="tokens of an evaluation window (default: the experiment's)")
    parser.add_argument("--eval-windows", type=int, default=ALL_WINDOWS, help="windows at most (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.list:
            print(experiment_list())
        else:
            print(tables(Path(args.table)) if args.table else run(EXPERIMENTS[args.run], args))
    except InputError as error:
        print(f"paper_tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
