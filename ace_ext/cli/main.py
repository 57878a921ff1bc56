"""``ace-prune run | plan | compare | eval | verify``. Results go to stdout, progress and errors to stderr.

Exit status: 0 done, 2 bad input (one line that says what and how to mend it), 1 a fault, or a folder that fails verify.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TextIO

from ace_ext.cli.compare import add_compare
from ace_ext.data.perplexity import perplexity
from ace_ext.data.windows import evaluation_tokens
from ace_ext.engine.devices import pick_device
from ace_ext.engine.progress import Progress
from ace_ext.errors import InputError
from ace_ext.models.loading import WEIGHT_DTYPES, load_model
from ace_ext.process_memory import parse_bytes
from ace_ext.pruning.config import (
    ALLOCATIONS,
    GRAMS,
    GROUPS,
    ORDERS,
    REFINES,
    SALIENCIES,
    TOKEN_NORMS,
    UPDATES,
    PruneConfig,
)
from ace_ext.pruning.criteria import DEFAULT_METRIC, METRICS
from ace_ext.pruning.presets import PRESETS, PUBLISHED, TUNE_EPOCHS, preset_config
from ace_ext.reporting.html import check_report
from ace_ext.reporting.run_page import write_run_report
from ace_ext.runs.options import OFFLOAD, Calibration, RunOptions
from ace_ext.runs.pipeline import prune_folder
from ace_ext.runs.plan import make_plan
from ace_ext.runs.verify import verify
from ace_ext.version import __version__


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ace-prune", description="One-shot pruning of Hugging Face causal language models.")
    parser.add_argument("--version", action="version", version=f"ace-prune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | plan | compare | eval | verify")
    _add_run(commands)
    _add_plan(commands)
    add_compare(commands, _add_model)
    _add_eval(commands)
    _add_verify(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *WEIGHT_DTYPES], help="of the weights")
    parser.add_argument("--text-field", default="text", help="the field of a .jsonl line (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_run(commands) -> None:
    parser = commands.add_parser(
        "run", help="prune a model", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_metric_table()
    )
    _add_model(parser)
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    _add_pruning(parser)
    _add_calibration(parser)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--resume", action="store_true", help="go on where an earlier run of the same arguments stopped, if any"
    )
    _add_memory(run)
    run.add_argument(
        "--save-stats",
        metavar="FILE",
        type=Path,
        help="keep the statistics (order block); they, and so this run, then read the dense model: blocks do not get "
        "what pruned ones before them put out",
    )
    run.add_argument(
        "--stats",
        metavar="FILE",
        type=Path,
        help="prune from kept statistics at any sparsity, pattern or metric, without a forward pass (order block)",
    )
    run.add_argument("--report", metavar="FILE.html", type=Path, help="write a page about the run there")
    run.add_argument("--log-json", metavar="FILE", help="a JSON line a block; - for stderr")
    parser.set_defaults(action=_run)


def _add_plan(commands) -> None:
    parser = commands.add_parser("plan", help="what a run would prune, and the memory and time it would take")
    _add_model(parser)
    _add_pruning(parser)
    _add_calibration(parser)
    _add_memory(parser.add_argument_group("the run"))
    parser.set_defaults(action=_plan)


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    parser = parser.add_argument_group("pruning")
    parser.add_argument(
        "--preset", choices=[*PRESETS, *PUBLISHED], help="settings by name, which the options given here change"
    )
    parser.add_argument("--metric", choices=METRICS, metavar="NAME", help=f"see below (default: {DEFAULT_METRIC})")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help="share of zeros (default: 0.5)")
    amount.add_argument("--pattern", help="N:M, N kept of M consecutive inputs, e.g. 2:4")
    parser.add_argument("--group", choices=GROUPS, help="which weights compete (default: row)")
    parser.add_argument("--order", choices=ORDERS, help="of work in a block (default: sequential)")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="weights to leave dense")
    parser.add_argument("--ria-exponent", type=float, help="of the input norm in ria (default: 0.5)")
    parser.add_argument(
        "--token-norm",
        choices=TOKEN_NORMS,
        help="where the norms of outputs come from that weigh tokens: exact, or a sketch, which is faster in the "
        "sequential order and its default (block: exact)",
    )
    _add_solver(parser)
    parser.add_argument("--batch-tokens", type=int, help="tokens through a block at a time (default: 16384)")


def _add_solver(parser) -> None:
    parser.add_argument("--refine", choices=REFINES, help="exchange kept and pruned weights while the error falls")
    parser.add_argument(
        "--update",
        action="append",
        choices=[*UPDATES, "tune"],
        help="weights that stay make up for the others: obs (SparseGPT's) or admm; tune, alone or after one of these: "
        "train each block on the calibration tokens",
    )
    parser.add_argument("--gram", choices=GRAMS, help="how refine and update weigh tokens (default: plain)")
    parser.add_argument("--damping", type=float, help="of the Gram matrix (default: 0.01 for obs, 0.1 for admm)")
    parser.add_argument("--iterations", type=int, help="of admm (default: 20)")
    parser.add_argument("--saliency", choices=SALIENCIES, help="by what admm chooses its mask (default: obs)")
    parser.add_argument("--max-swaps", type=int, help="in a row (default: 100)")
    parser.add_argument("--tune-epochs", type=int, help=f"of --update tune (default: {TUNE_EPOCHS})")
    parser.add_argument("--tune-lr", type=float, help="of --update tune (default: 2e-4)")
    parser.add_argument(
        "--allocation", choices=ALLOCATIONS, help="of sparsity to blocks, the total fixed (default: uniform)"
    )
    parser.add_argument("--allocation-range", type=float, help="how far a block may differ (default: 0.05)")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser = parser.add_argument_group("calibration")
    parser.add_argument(
        "--calibration",
        default="self",
        help="self (the model writes it), wiki-mini, news-mini, c4, wikitext2, FILE.txt or FILE.jsonl (default: self)",
    )
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: %(default)s)")


def _add_memory(parser) -> None:
    parser.add_argument(
        "--offload",
        default="auto",
        choices=OFFLOAD,
        help="disk: read and write one block at a time; auto: where the model does not fit (default: %(default)s)",
    )
    parser.add_argument("--max-memory", metavar="SIZE", help="resident memory that the run may take, e.g. 2GB")


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="perplexity of a model on held-out text")
    _add_model(parser)
    parser.add_argument("--text", required=True, help="wiki-mini, news-mini, wikitext2, c4, FILE.txt or FILE.jsonl")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="read at most so many tokens (default: all)")
    parser.set_defaults(action=_eval)


def _add_verify(commands) -> None:
    parser = commands.add_parser("verify", help="prove the sparsity of a written folder")
    parser.add_argument("folder", help="what ace-prune run wrote")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.set_defaults(action=_verify)


def _metric_table() -> str:
    width = max(map(len, METRICS))
    return "metrics:\n" + "\n".join(f"  {name:<{width}}  {metric.formula}" for name, metric in METRICS.items())


def _config(args: argparse.Namespace) -> PruneConfig:
    """The preset's settings, changed by every option that was given."""
    names = [field.name for field in dataclasses.fields(PruneConfig) if field.name != "update"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given["skip"] = tuple(args.skip)
    updates = list(dict.fromkeys(args.update or ()))
    if "tune" in updates:
        updates.remove("tune")
        given.setdefault("tune_epochs", TUNE_EPOCHS)
    elif "tune_epochs" in given and args.preset is None:
        raise InputError("tune-epochs is for --update tune; give both, or neither")
    if len(updates) > 1:
        raise InputError(f"update must be obs or admm, with or without tune (got {' and '.join(updates)})")
    if updates:
        given["update"] = updates[0]
    return PruneConfig(**given) if args.preset is None else preset_config(args.preset, **given)


def _calibration(args: argparse.Namespace) -> Calibration:
    return Calibration(args.calibration, args.nsamples, args.seqlen, args.seed, args.text_field)


def _run(args: argparse.Namespace) -> int:
    if args.report is not None:
        check_report(args.report)
    options = RunOptions(
        args.overwrite,
        args.resume,
        args.offload,
        None if args.max_memory is None else parse_bytes(args.max_memory),
        args.save_stats,
        args.stats,
    )
    with contextlib.ExitStack() as opened:
        log = _open_log(args.log_json, opened)
        report, path = prune_folder(
            args.model,
            args.output,
            _config(args),
            _calibration(args),
            options,
            pick_device(args.device),
            args.dtype,
            Progress(_shows_progress(args), log),
        )
    if int(os.environ.get("RANK", "0")) == 0:
        if args.report is not None:
            write_run_report(report, args.report)
        print(report.to_json() if args.json else f"{report.table()}\nwritten to {path}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    budget = None if args.max_memory is None else parse_bytes(args.max_memory)
    options = RunOptions(offload=args.offload, max_memory=budget)
    plan = make_plan(args.model, _config(args), _calibration(args), options, pick_device(args.device), args.dtype)
    print(plan.to_json() if args.json else plan.table())
    return 0


def _open_log(name: str | None, opened: contextlib.ExitStack) -> TextIO | None:
    if name is None or name == "-":
        return sys.stderr if name else None
    try:
        return opened.enter_context(open(name, "a", encoding="utf-8"))
    except OSError as error:
        raise InputError(f"log-json {name!r} cannot be written: {error.strerror}; give another file") from error


def _eval(args: argparse.Namespace) -> int:
    loaded = load_model(args.model, args.dtype, pick_device(args.device))
    tokens = evaluation_tokens(args.text, loaded.tokenizer, text_field=args.text_field)
    result = perplexity(loaded.model, tokens, args.seqlen, args.max_tokens, progress=_shows_progress(args))
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **result.to_dict()}))
    else:
        print(f"perplexity {result.perplexity:.3f} on {args.text}: {result.windows} windows of {result.seqlen} tokens")
    return 0


def _verify(args: argparse.Namespace) -> int:
    result = verify(args.folder)
    if args.json:
        print(json.dumps(vars(result)))
    else:
        rows = f", {result.exact_rows} of {result.rows} groups with exactly k non-zeros" if result.rows else ""
        print(f"{result.matrices} matrices, sparsity {result.sparsity:.4f}{rows}")
        print("\n".join(f"FAULT {problem}" for problem in result.problems) or "sound: counts, zeros, finite, loads")
    return 1 if result.problems else 0


def _shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        return args.action(args)
    except InputError as error:
        print(f"ace-prune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ace-prune: interrupted; run goes on with --resume where it stopped", file=sys.stderr)
        return 130


def _quiet_libraries() -> None:
    """The libraries' own bars and warnings would bury the one line that matters."""
    import logging

    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
