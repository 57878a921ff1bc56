"""``ace-prune compare``: methods × sparsities × calibration lengths × sources × seeds on one model, in one table.

The dense model is loaded once and its weights are put back before each run. Runs that draw the same calibration windows
share them. Statistics are not shared: from the second block on they come from the outputs of the pruned blocks before,
so they are each run's own (but for the group ``model``).
"""

import argparse
import hashlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .bench import Bench, weights_sha256
from .checkpoint import load_model
from .config import PruneConfig
from .devices import pick_device
from .errors import InputError
from .html_report import write_study_report
from .methods import METHODS, Method, parse_methods
from .plots import require_matplotlib
from .report import versions
from .results import Cell, Journal, Results
from .tables import markdown_table, results_json, text_table
from .texts import CALIBRATION, HELD_OUT, SELF, SOURCES, load_text


@dataclass(frozen=True)
class Study:
    """The grid and what its runs share. ``amounts`` are shares of zeros like ``"0.5"`` and patterns like ``"2:4"``;
    ``lengths`` are pairs ``(nsamples, seqlen)``.

    Raises:
        InputError: for an empty or repeated list, and for whatever :class:`ace_ext.PruneConfig` refuses of any
            method with any amount: all before a model is loaded.
    """

    model: str
    methods: tuple[Method, ...]
    amounts: tuple[str, ...] = ("0.5",)
    lengths: tuple[tuple[int, int], ...] = ((128, 128),)
    calibrations: tuple[str, ...] = (SELF,)
    seeds: tuple[int, ...] = (0,)
    texts: tuple[str, ...] = ("wiki-mini",)
    eval_seqlen: int = 512
    eval_windows: int = 24
    skip: tuple[str, ...] = ()
    batch_tokens: int = 16384
    text_field: str = "text"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("methods", "amounts", "lengths", "calibrations", "seeds", "texts"):
            values = getattr(self, name)
            if not values or len(set(map(str, values))) < len(values):
                raise InputError(f"{name} must be at least one, each given once (got {', '.join(map(str, values))})")
        if self.eval_seqlen < 2 or self.eval_windows < 1:
            found = f"got {self.eval_windows} windows of {self.eval_seqlen}"
            raise InputError(f"evaluation must have at least 1 window of at least 2 tokens ({found})")
        for method, amount in itertools.product(self.methods, self.amounts):
            self.config(method, amount)

    def config(self, method: Method, amount: str) -> PruneConfig:
        """What a method with an amount stands for."""
        return method.config(**_amount(amount), skip=self.skip, batch_tokens=self.batch_tokens)

    def cells(self) -> Iterator[tuple[Cell, Method]]:
        """The grid in the order of work: runs with the same calibration windows follow one another."""
        data = itertools.product(self.calibrations, self.lengths, self.seeds)
        for (source, (nsamples, seqlen), seed), amount, method in itertools.product(data, self.amounts, self.methods):
            yield Cell(method.label, amount, source, nsamples, seqlen, seed), method

    def settings(self, device: torch.device) -> dict:
        """What has to be the same for two runs to stand in one table; evaluation files by their content."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "device": device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,  # moves rounding, and seconds
            "skip": list(self.skip),
            "batch_tokens": self.batch_tokens,
            "texts": {text: source_sha256(text, HELD_OUT, self.text_field) for text in self.texts},
            "eval_seqlen": self.eval_seqlen,
            "eval_windows": self.eval_windows,
            "versions": versions(),
        }


def _amount(text: str) -> dict:
    if ":" in text:
        return {"pattern": text}
    try:
        return {"sparsity": float(text)}
    except ValueError as error:
        raise InputError(f"sparsities must be numbers from 0 to 1 (got {text!r})") from error


def source_sha256(source: str, split: str, text_field: str) -> str | None:
    """Of a local file's documents; None for a source that its name fixes. Raises InputError for a bad file."""
    if (source == SELF and split == CALIBRATION) or source in SOURCES:
        return None
    return hashlib.sha256("\n\n".join(load_text(source, split, text_field)).encode("utf-8")).hexdigest()


# --- the work ---------------------------------------------------------------------------------------------------------


def run_study(study: Study, device: torch.device, output: Path | None = None, progress: bool = False) -> Results:
    """Works through the grid, skipping what ``output`` already records, and writes each run there at once.

    Args:
        device: where the model is put.
        output: a folder; None keeps the results in memory only.
        progress: a bar over the runs on stderr.

    Returns:
        All runs of the folder: this grid's and those recorded before.

    Raises:
        InputError: bad input of any kind; what can be known before the model is loaded is checked before.
    """
    sources = {source: source_sha256(source, CALIBRATION, study.text_field) for source in study.calibrations}
    journal = Journal(output, study.settings(device))
    for cell, method in study.cells():
        journal.refuse_changed(cell, study.config(method, cell.amount).to_dict(), sources[cell.calibration])
    missing = [(cell, method) for cell, method in study.cells() if journal.results.find(cell) is None]
    if missing or not journal.results.dense:
        loaded = load_model(study.model, study.dtype, device)
        bench = Bench(loaded, study.texts, study.eval_seqlen, study.eval_windows, study.text_field)
        weights = weights_sha256(bench.model)
        if not journal.results.dense:
            journal.add_dense(bench.evaluate(), weights)
        elif weights != journal.results.weights_sha256:
            raise InputError(
                f"{study.model} holds other weights than {journal.path} was recorded with; use another output"
            )
        with tqdm(total=len(missing), desc="comparing", unit="run", disable=not progress, file=sys.stderr) as bar:
            for cell, method in missing:
                bar.set_postfix_str(f"{cell.method} {cell.amount} {cell.length} seed {cell.seed}")
                journal.add(bench.run(cell, study.config(method, cell.amount), sources[cell.calibration]))
                bar.update()
    return journal.results


# --- the command ------------------------------------------------------------------------------------------------------


def add_compare(commands, add_model) -> None:
    """Adds the subcommand ``compare`` to argparse's ``commands``; ``add_model(parser)`` adds the shared arguments."""
    parser = commands.add_parser(
        "compare",
        help="compare methods, sparsities and calibration on one model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_method_table(),
    )
    add_model(parser)
    parser.add_argument("--methods", default="wanda,ace", help="a list, see below (default: %(default)s)")
    parser.add_argument("--sparsities", help="a list of shares of zeros, e.g. 0.5,0.6 (default: 0.5)")
    parser.add_argument("--patterns", help="a list of N:M, N kept of M consecutive inputs, e.g. 2:4,4:8")
    parser.add_argument(
        "--lengths", default="128x128", help="a list of nsamples x seqlen, e.g. 64x128,16x512 (default: %(default)s)"
    )
    parser.add_argument("--calibration", default=SELF, help="a list of texts, see run --help (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="a list, e.g. 0,1,2 (default: %(default)s)")
    parser.add_argument("--texts", default="wiki-mini", help="a list of texts to evaluate on (default: %(default)s)")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--eval-windows", type=int, default=24, help="at most so many (default: %(default)s)")
    parser.add_argument("--skip", action="append", default=[], metavar="REGEX", help="weights to leave dense")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="tokens through a block at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="runs.jsonl, results.json, report.html and plots go here; called again, goes on from what is there",
    )
    parser.add_argument("--markdown", action="store_true", help="a markdown table on stdout")
    parser.set_defaults(action=compare)


def _method_table() -> str:
    width = max(map(len, METHODS))
    lines = [f"  {name:<{width}}  {_words(arguments)}" for name, arguments in METHODS.items()]
    changes = "any of them with changes, name:key=value,key=value, e.g. wanda:order=block"
    return "\n".join(["methods (settings beside the defaults of run):", *lines, "", changes])


def _words(arguments: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items())


def study_from(args: argparse.Namespace) -> Study:
    """The study that parsed arguments of ``compare`` ask for. Raises InputError for a value that is no such thing."""
    amounts = (*_split(args.sparsities), *_split(args.patterns)) or ("0.5",)
    return Study(
        model=args.model,
        methods=parse_methods(args.methods),
        amounts=amounts,
        lengths=tuple(parse_length(text) for text in _split(args.lengths)),
        calibrations=_split(args.calibration),
        seeds=tuple(_whole("seeds", text) for text in _split(args.seeds)),
        texts=_split(args.texts),
        eval_seqlen=args.eval_seqlen,
        eval_windows=args.eval_windows,
        skip=tuple(args.skip),
        batch_tokens=args.batch_tokens,
        text_field=args.text_field,
        dtype=args.dtype,
    )


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def parse_length(text: str) -> tuple[int, int]:
    """From text like ``"64x128"`` to ``(nsamples, seqlen)``."""
    parts = text.split("x")
    if len(parts) != 2:
        raise InputError(f"lengths must be nsamples x seqlen, e.g. 64x128 (got {text!r})")
    nsamples, seqlen = (_whole("lengths", part) for part in parts)
    if nsamples < 1 or seqlen < 2:
        raise InputError(f"lengths must be at least 1 sample of at least 2 tokens (got {text!r})")
    return nsamples, seqlen


def _whole(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"{name} must be whole numbers from 0 (got {text!r})")
    return int(text)


def compare(args: argparse.Namespace) -> int:
    """The action of ``ace-prune compare``."""
    if args.json and args.markdown:
        raise InputError("--json and --markdown exclude each other; give one")
    study = study_from(args)
    output = Path(args.output).expanduser() if args.output else None
    if output is not None:
        require_matplotlib()
    progress = not args.quiet and sys.stderr.isatty()
    results = run_study(study, pick_device(args.device), output, progress)
    if output is not None:
        write_study_report(results, output)
    if args.json:
        print(results_json(results), end="")
    else:
        print(markdown_table(results) if args.markdown else text_table(results))
    return 0
