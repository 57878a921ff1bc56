"""``ace-prune bench``: speed, memory and size of a packed folder and of the dense one."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from tabulate import tabulate
from tqdm import tqdm

from ace_ext.cli import args as shared
from ace_ext.errors import InputError
from ace_ext.packed.files import is_packed
from ace_ext.packed.packing import unpack
from ace_ext.reporting.bench_plot import check_plot, write_plot
from ace_ext.runtime.bench import BenchProgress, BenchResult, BenchSettings, Difference, Pair, bench

EXAMPLES = (
    "bench packed",
    "bench packed --dense pruned --tokens 32",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    default = BenchSettings()
    parser = commands.add_parser(
        "bench", help="compare the speed and memory of a packed folder with the dense one, on the CPU"
    )
    parser.add_argument("folder", help="a folder that ace-prune pack wrote")
    parser.add_argument(
        "--dense",
        metavar="DIR",
        help="the dense folder (default: FOLDER is unpacked beside itself and removed at the end)",
    )
    parser.add_argument("--tokens", type=int, default=default.tokens, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="runs of each model (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=int, default=default.prefill, help="tokens of a prefill (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="also draw the figures (needs matplotlib)")
    shared.add_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no notes on stderr")
    parser.set_defaults(action=run)


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    if not is_packed(args.folder):
        raise InputError(f"{args.folder!r} is not packed; give a folder that ace-prune pack wrote")
    if args.plot is not None:
        check_plot(args.plot)
    settings = BenchSettings(tokens=args.tokens, rounds=args.rounds, prefill=args.prefill)
    with contextlib.ExitStack() as opened:
        opened.enter_context(_ended_by_signals())
        dense = args.dense
        if dense is None:
            packed = Path(args.folder).expanduser().absolute()
            place = tempfile.TemporaryDirectory
            try:
                dense = Path(opened.enter_context(place(prefix=f".{packed.name}.bench-", dir=packed.parent))) / "dense"
            except OSError as error:
                raise InputError(
                    f"the dense folder cannot be unpacked beside {args.folder!r} ({error.strerror}); pass --dense"
                ) from error
            unpack(args.folder, dense)
        result = bench(str(dense), args.folder, settings, opened.enter_context(_progress(args, settings.steps)))
    if args.plot is not None:
        write_plot(result, args.plot)
    print(json.dumps(asdict(result)) if args.json else table(result))
    return 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raises SystemExit at SIGTERM and SIGHUP, so that temporary files are removed."""

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(args: argparse.Namespace, steps: int) -> Iterator[BenchProgress]:
    """On a terminal a bar with the remaining time, else a line for each phase; nothing with ``--quiet``."""
    if not shared.shows_progress(args):
        yield BenchProgress(lambda text: shared.note(args, text))
        return
    with tqdm(total=steps, unit="run", file=sys.stderr, leave=False) as bar:
        yield BenchProgress(bar.set_description, bar.update)


def table(result: BenchResult) -> str:
    """The figures as a table, with the dtype, threads and instruction set of the measurement."""
    rows = [_row(f"decode, batch {batch}: tokens/s", pair, 1) for batch, pair in result.decode.items()]
    for name, pair, unit in (
        (f"prefill of {result.prefill_tokens} tokens: s", result.prefill, 1),
        ("load: s", result.load, 1),
        ("resident memory: MB", result.memory, 10**6),
        ("weight files: MB", result.files, 10**6),
    ):
        if pair is not None:
            rows.append(_row(name, pair, unit))
    text = tabulate(rows, headers=["", "dense", "packed", "packed is better by"], disable_numparse=True)
    runs = "1 run each" if result.rounds == 1 else f"medians of {result.rounds} runs each"
    lines = [text, f"packed and dense hold the same weights; their logits differ by {_difference(result.logits)}"]
    if result.rounding is not None:
        lines.append(f"for scale: dense in {result.dtype} and in float32 differ by {_difference(result.rounding)}")
    lines.append(f"{result.dtype}, {result.threads} threads, {result.capability}; {runs}, alternating")
    return "\n".join(lines)


def _difference(found: Difference) -> str:
    return f"{100 * found.relative:.2g} % of their standard deviation, one logit by at most {found.largest:.3g}"


def _row(name: str, pair: Pair, unit: int) -> list[str]:
    return [name, f"{pair.dense / unit:.4g}", f"{pair.packed / unit:.4g}", f"{pair.ratio:.2f} x"]
