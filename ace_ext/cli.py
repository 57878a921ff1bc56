"""``ace-prune run | plan | eval | verify``. Results go to stdout, progress and errors to stderr.

Exit status: 0 done, 2 bad input (one line that says what and how to mend it), 1 a fault, or a folder that fails verify.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TextIO

import torch

from .calibration import evaluation_tokens
from .checkpoint import DTYPES, load_model
from .config import GROUPS, ORDERS, PruneConfig
from .errors import InputError
from .evaluate import perplexity
from .extension import build_info
from .memory import parse_bytes
from .pipeline import OFFLOAD, Calibration, RunOptions, prune_folder
from .plan import make_plan
from .progress import Progress
from .ranks import launched
from .scores import DEFAULT_METRIC, METRICS
from .verify import verify
from .version import __version__


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of this program."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ace-prune", description="One-shot pruning of Hugging Face causal language models.")
    parser.add_argument("--version", action="version", version=f"ace-prune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | plan | eval | verify")
    _add_run(commands)
    _add_plan(commands)
    _add_eval(commands)
    _add_verify(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the weights")
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
    run.add_argument("--resume", action="store_true", help="go on where an earlier run of the same arguments stopped")
    _add_memory(run)
    run.add_argument("--save-stats", metavar="FILE", type=Path, help="keep the statistics (order block)")
    run.add_argument(
        "--stats", metavar="FILE", type=Path, help="prune from kept statistics, without a forward pass (order block)"
    )
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
    parser.add_argument("--metric", default=DEFAULT_METRIC, choices=METRICS, metavar="NAME", help="see below")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help="share of zeros (default: 0.5)")
    amount.add_argument("--pattern", help="N:M, N kept of M consecutive inputs, e.g. 2:4")
    parser.add_argument("--group", default="row", choices=GROUPS, help="which weights compete (default: %(default)s)")
    parser.add_argument("--order", choices=ORDERS, help="of work in a block (default: sequential)")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="weights to leave dense")
    parser.add_argument("--ria-exponent", type=float, default=0.5, help="of the input norm in ria")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="tokens through a block at a time (default: %(default)s)"
    )


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


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one and the extension was built for it, else the CPU."""
    usable = torch.cuda.is_available() and build_info()["cuda"] is not None
    if name == "auto":
        local = int(os.environ.get("LOCAL_RANK", "0"))  # each process that torchrun starts has a GPU of its own
        return torch.device("cuda", local) if usable and launched() else torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu or cuda (got {name!r})") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not usable):
        why = "torch sees no GPU" if not torch.cuda.is_available() else "ace_ext was built CPU-only; see README"
        raise InputError(f"device {name!r} cannot be used here ({why}); use --device cpu")
    return device


def _config(args: argparse.Namespace) -> PruneConfig:
    return PruneConfig(
        metric=args.metric,
        sparsity=args.sparsity,
        pattern=args.pattern,
        group=args.group,
        order=args.order,
        skip=tuple(args.skip),
        ria_exponent=args.ria_exponent,
        batch_tokens=args.batch_tokens,
    )


def _calibration(args: argparse.Namespace) -> Calibration:
    return Calibration(args.calibration, args.nsamples, args.seqlen, args.seed, args.text_field)


def _run(args: argparse.Namespace) -> int:
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
