"""``ace-prune bench``: speed, memory and size of packed and smaller folders, of the dense one, and of the weights in
llama.cpp and vLLM."""

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

from ace_ext.bench.candidates import engines_of, folder_candidates
from ace_ext.bench.contest import (
    ContestResult,
    Figures,
    check_gguf,
    check_shapes,
    contest,
    contest_steps,
    gguf_candidates,
    vllm_candidates,
)
from ace_ext.bench.pair import BenchResult, Difference, Pair, bench, pair_steps
from ace_ext.bench.settings import BenchProgress, BenchSettings
from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.errors import InputError, counted, existing_folder
from ace_ext.packed.files import is_packed
from ace_ext.packed.packing import unpack
from ace_ext.reporting.bench_plot import check_plot, contest_plot, pair_plot, write_plot

EXAMPLES = (
    "bench packed",
    "bench packed --dense pruned --tokens 32",
    "bench packed packed-int8 --dense pruned --against llama.cpp:bf16,llama.cpp:q8_0",
    "bench smaller --dense dense --against llama.cpp:q8_0,vllm",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    default = BenchSettings()
    parser = commands.add_parser("bench", help=VERBS["bench"])
    parser.add_argument(
        "folders", nargs="+", metavar="folder", help="a folder that ace-prune pack or run --remove wrote, or several"
    )
    parser.add_argument(
        "--dense",
        metavar="DIR",
        help="the dense folder (default: the first folder is unpacked beside itself and removed at the end)",
    )
    parser.add_argument(
        "--against",
        action="append",
        metavar="ENGINES",
        help="also measure the dense weights in llama.cpp: llama.cpp:bf16, llama.cpp:q8_0, llama.cpp:q4_0, a list of "
        "these, or llama.cpp for all (GGUF files are written beside the first folder and removed at the end); "
        "llama.cpp:FILE.gguf measures a file of yours; needs ace_ext[llama]. vllm: the same in vLLM, packed folders "
        "excepted",
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
    smaller = [folder for folder in args.folders if not is_packed(existing_folder(folder))]
    if smaller and args.dense is None:
        raise InputError(
            f"{smaller[0]!r} is not packed; give a folder that ace-prune pack wrote, or the dense folder too (--dense)"
        )
    if args.dense is not None:
        existing_folder(args.dense)
    if args.plot is not None:
        check_plot(args.plot)
    settings = BenchSettings(tokens=args.tokens, rounds=args.rounds, prefill=args.prefill)
    sources, served = engines_of(args.against or ())
    with contextlib.ExitStack() as opened:
        opened.enter_context(_ended_by_signals())
        dense = args.dense
        if dense is None:
            dense = (
                _temporary(args.folders[0], opened, "the dense folder cannot be unpacked", "; pass --dense") / "dense"
            )
            unpack(args.folders[0], dense)
        found: BenchResult | ContestResult
        if len(args.folders) == 1 and not (smaller or sources or served):
            progress = opened.enter_context(_progress(args, pair_steps(settings)))
            found = bench(str(dense), args.folders[0], settings, progress)
        else:
            found = _contest(args, str(dense), sources, served, settings, opened)
    if args.plot is not None:
        write_plot(pair_plot(found) if isinstance(found, BenchResult) else contest_plot(found), args.plot)
    if args.json:
        print(json.dumps(asdict(found)))
    else:
        print(table(found) if isinstance(found, BenchResult) else contest_table(found))
    return 0


def _contest(
    args: argparse.Namespace,
    dense: str,
    sources: list[str | Path],
    served: bool,
    settings: BenchSettings,
    opened: contextlib.ExitStack,
) -> ContestResult:
    others = folder_candidates(args.folders)
    check_shapes(dense, others)
    smaller = [own for own in others if own.beside]
    written = sum(isinstance(source, str) for source in sources)
    elsewhere = len(sources) + written * len(smaller) + served * (1 + len(smaller))
    if sources:
        check_gguf(dense, sources, smaller)
        place = _temporary(args.folders[0], opened, "GGUF files cannot be written")
    progress = opened.enter_context(_progress(args, contest_steps(1 + len(others) + elsewhere, settings)))
    if sources:
        others += gguf_candidates(dense, sources, place, progress, smaller)
    if served:
        others += vllm_candidates(dense, smaller)
    return contest(dense, others, settings, progress)


def _temporary(folder: str, opened: contextlib.ExitStack, problem: str, remedy: str = "") -> Path:
    """A folder beside ``folder`` that is removed at the end: files as large as weights may not fit elsewhere."""
    packed = Path(folder).expanduser().absolute()
    try:
        made = tempfile.TemporaryDirectory(prefix=f".{packed.name}.bench-", dir=packed.parent)
    except OSError as error:
        raise InputError(f"{problem} beside {folder!r} ({error.strerror}){remedy}") from error
    return Path(opened.enter_context(made))


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
    lines = [text, f"packed and dense hold the same weights; their logits differ by {_difference(result.logits)}"]
    if result.rounding is not None:
        lines.append(f"for scale: dense in {result.dtype} and in float32 differ by {_difference(result.rounding)}")
    lines.append(f"{result.dtype}, {counted(result.threads, 'thread')}, {result.capability}; {_runs(result.rounds)}")
    return "\n".join(lines)


def contest_table(result: ContestResult) -> str:
    """A line for each candidate, with ratios to the dense folder in parentheses, then engines and threads."""
    batches = list(result.figures[0].decode)
    headers = ["", *(f"decode, batch {batch}" for batch in batches), f"prefill of {result.prefill_tokens}"]
    headers = ["\n".join(header.split(", ")) for header in headers]
    headers += ["bits a\nweight", "files\nMB", "memory\nMB"]
    rows = [_line(figures, batches) for figures in result.figures]
    text = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))
    lines = [text, "speeds: tokens/s (and times that of dense); memory: of the whole process after one token"]
    engines: dict[str, list[str]] = {}
    for figures in result.figures:
        engines.setdefault(figures.engine, []).append(figures.name)
    lines += [f"{engine}: {', '.join(names)}" for engine, names in engines.items()]
    lines += [_beside(figures) for figures in result.figures if figures.beside]
    lines.append(f"dense is {result.dtype}; {counted(result.threads, 'thread')}; {_runs(result.rounds)}")
    return "\n".join(lines)


def _line(figures: Figures, batches: list[int]) -> list[str]:
    speeds = [(figures.decode[batch], figures.decode_ratios[batch]) for batch in batches]
    cells = [f"{speed:.4g} ({ratio:.2f})" for speed, ratio in (*speeds, (figures.prefill, figures.prefill_ratio))]
    sizes = [f"{size / 10**6:.4g}" for size in (figures.file_bytes, figures.memory_bytes)]
    return [figures.name, *cells, f"{figures.bits:.2f}", *sizes]


def _beside(figures: Figures) -> str:
    """How a smaller model compares with the dense one in the same engine."""
    speeds = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in figures.beside_decode.items())
    return (
        f"{figures.name} beside {figures.beside}: decodes {speeds} times as fast, prefill {figures.beside_prefill:.2f}"
    )


def _runs(rounds: int) -> str:
    return f"{'1 run' if rounds == 1 else f'medians of {rounds} runs'} each, alternating"


def _difference(found: Difference) -> str:
    return f"{100 * found.relative:.2g} % of their standard deviation, one logit by at most {found.largest:.3g}"


def _row(name: str, pair: Pair, unit: int) -> list[str]:
    return [name, f"{pair.dense / unit:.4g}", f"{pair.packed / unit:.4g}", f"{pair.ratio:.2f} x"]
