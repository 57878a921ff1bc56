"""Arguments that several verbs share. The help on methods reads the registries, so it lists new stages by itself."""

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ace_ext.data.bos import AUTO, MODES, NEVER, default_mode
from ace_ext.data.corpora import BUNDLED, SELF, SOURCES
from ace_ext.data.mixture import is_jsonl
from ace_ext.engine.devices import pick_device
from ace_ext.errors import InputError
from ace_ext.models.loading import WEIGHT_DTYPES
from ace_ext.models.patterns import all_but, glob_pattern
from ace_ext.process_memory import parse_bytes
from ace_ext.pruning.config import MAX_DENSE, SPARSITY, PruneConfig
from ace_ext.pruning.groups import GROUPS
from ace_ext.pruning.method import DEFAULT, PRESETS, PUBLISHED, options_of
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.settings import Setting
from ace_ext.pruning.stages import KINDS, Score, stages_of
from ace_ext.runs.media import reader_of
from ace_ext.runs.options import (
    EVALUATE_AUTO,
    EVALUATE_NEVER,
    OFFLOAD,
    Calibration,
    InputCalibration,
    RunOptions,
    RunRequest,
)
from ace_ext.runs.output import check_outside, output_path
from ace_ext.runs.own_files import check_replaceable, is_log

Subparsers = Any
"""The type that ``add_subparsers`` returns; it is private to argparse."""


def add_remote_code(parser: argparse.ArgumentParser) -> None:
    """Adds the permission to run Python code of a model; :func:`ace_ext.cli.main.main` reads it."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model, if it needs any"
    )


def add_model(parser: argparse.ArgumentParser, help: str = "a folder, a .gguf file, or a hub name") -> None:
    """Adds the model, how to load it, and the options of every verb that loads one."""
    parser.add_argument("--model", required=True, help=help)
    add_remote_code(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *WEIGHT_DTYPES], help="dtype of the weights")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes on stderr")


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a share from 0 to 1, such as 0.5, was expected (got {text!r})") from error


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Adds the method and the target: what :class:`ace_ext.PruneConfig` takes."""
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--method",
        metavar="METHOD",
        help='a preset, a preset with other options as in "balanced(damping=0.2)", or stages joined by + as in '
        f'"wanda + swaps" (default: {DEFAULT})',
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=_share, metavar="SHARE", help=f"share of zeros (default: {SPARSITY})")
    amount.add_argument("--pattern", help="N:M, N kept of M consecutive inputs, e.g. 2:4")
    group.add_argument(
        "--remove",
        metavar="WHAT",
        help="remove neurons=SHARE, heads=SHARE, experts=SHARE, blocks=SHARE or COUNT, joined by +, or "
        "params=SHARE; zeros follow if --sparsity or --pattern is given",
    )
    group.add_argument(
        "--group",
        choices=GROUPS,
        help="which weights are compared with each other (default: row; matrix if obs, alps or thanos choose the mask)",
    )
    add_selection(group, "weights to leave dense")
    group.add_argument(
        "--towers",
        action="append",
        default=[],
        metavar="REGEX",
        help="names of lists of blocks: only these are pruned, also those of a vision or audio tower that stays dense "
        "otherwise",
    )
    group.add_argument(
        "--max-dense",
        type=float,
        default=MAX_DENSE,
        help="share of a block's weights that may stay dense because their layout cannot be pruned "
        "(default: %(default)s)",
    )


def add_selection(group: Any, help: str) -> None:
    """Adds the three options. ``help`` is the help of ``--skip``."""
    group.add_argument("--skip", action="append", default=[], metavar="REGEX", help=help)
    group.add_argument(
        "--exclude", action="append", metavar="GLOB", help="the same, as a glob for the whole name, e.g. '*.o_proj'"
    )
    group.add_argument("--include", action="append", metavar="GLOB", help="prune only these weights, e.g. '*.mlp.*'")


def skip_from(args: argparse.Namespace) -> tuple[str, ...]:
    """The regular expressions that the options of :func:`add_selection` stand for."""
    skip = [*args.skip, *(f"^{glob_pattern(glob)}$" for glob in args.exclude or ())]
    return (*skip, all_but(args.include)) if args.include else tuple(skip)


def preset_table() -> str:
    """The presets and published methods, and the texts that they stand for."""
    return table("presets and published methods, and what they stand for", {**PRESETS, **PUBLISHED})


def stage_tables() -> str:
    """Every metric and stage with its description and options."""
    lines = ["stages, joined by + in this order; name(option=value, …) changes an option (figures: docs/trials.md):"]
    for kind in KINDS:
        if kind is Score:
            for name, metric in METRICS.items():
                lines += _stage_lines(name, f"keeps the highest {metric.formula}", options_of(Score(name)).values())
            continue
        for name, stage in stages_of(kind).items():
            lines += _stage_lines(name, stage.summary, stage.settings())
    return "\n".join(lines)


def _stage_lines(name: str, summary: str, settings: Iterable[Setting]) -> list[str]:
    lines = [f"  {name:<11}  {summary}"]
    for setting in settings:
        text = f"{setting.name}: {setting_help(setting)}"
        lines += textwrap.wrap(text, 108, initial_indent=" " * 15, subsequent_indent=" " * 17)
    return lines


def add_setting(group: Any, setting: Setting) -> None:
    """Adds a flag for an option. Its value is None if the user does not give it: the declaration has the default."""
    kind = next(kind for kind in (int, float, str) if kind in setting.types)
    group.add_argument(f"--{setting.name.replace('_', '-')}", type=kind, help=setting_help(setting))


def setting_help(setting: Setting) -> str:
    """An option's help with its default."""
    return setting.help if setting.default is None else f"{setting.help} (default: {setting.default})"


def examples(*commands: str) -> str:
    """Example commands for the end of a help text."""
    return "examples:\n" + "\n".join(f"  ace-prune {command}" for command in commands)


def table(title: str, lines: dict[str, str]) -> str:
    """A title, then names and their descriptions in aligned columns."""
    width = max(map(len, lines))
    return f"{title}:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items())


def config_from(args: argparse.Namespace) -> PruneConfig:
    """The configuration of the parsed arguments. Raises InputError as :class:`ace_ext.PruneConfig`."""
    target = {name: getattr(args, name) for name in ("sparsity", "pattern", "group", "max_dense")}
    return PruneConfig(args.method, **target, skip=skip_from(args), towers=args.towers, remove=args.remove)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the calibration text and its amount. A flag that is not given is None: a run from statistics reads none."""
    default, group = Calibration(), parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        metavar="TEXT",
        help=f"{', '.join(SOURCES)}, {SELF} (the model writes it), FILE.txt, FILE.jsonl, or a mixture such as "
        f"'2 * {BUNDLED} + FILE.txt' (default: {BUNDLED}); text is used as is, without a chat template. A FOLDER of "
        "images or audio files, or a .jsonl of their paths and texts, for models that read these",
    )
    add_text_field(group)
    add_bos(group, "sample", f"{AUTO}; {NEVER} with a published method")
    group.add_argument(
        "--evaluate",
        metavar="TEXT",
        help="measure perplexity before and after, or an encoder's agreement with the dense model, on a little of this "
        f"text (images, sound); {EVALUATE_NEVER}: no measurement; {EVALUATE_AUTO}: on what calibration does not read "
        f"(default: {EVALUATE_AUTO})",
    )
    group.add_argument("--nsamples", type=int, help=f"samples (default: {default.nsamples})")
    group.add_argument("--seqlen", type=int, help=f"tokens of a sample (default: {default.seqlen})")
    group.add_argument("--seed", type=int, help=f"seed of the sampling (default: {default.seed})")


def add_text_field(group: Any, default: str = Calibration().text_field) -> None:
    """Adds the field of a ``.jsonl`` line that holds the text. The value is None if the flag is not given; ``default``
    says what that means."""
    group.add_argument("--text-field", help=f"the field of a .jsonl line (default: {default})")


def text_field_of(args: argparse.Namespace, *texts: str | None) -> str:
    """The field that ``--text-field`` names, or the default.

    Raises:
        InputError: the flag is given, but none of the texts is a ``.jsonl`` file.
    """
    if args.text_field is None:
        return Calibration().text_field
    if not is_jsonl(texts):
        found = ", ".join(text for text in texts if text and text not in (EVALUATE_AUTO, EVALUATE_NEVER)) or BUNDLED
        raise InputError(f"text-field is for .jsonl files (got {found}); leave it out")
    return str(args.text_field)


def add_bos(group: Any, window: str, default: str, flag: str = "--bos", more: Mapping[str, str] | None = None) -> None:
    """Adds the choice whether windows begin with the BOS token. The value is None if the flag is not given. ``more``:
    further choices, and what they do."""
    others = "".join(f"; {choice}: {what}" for choice, what in (more or {}).items())
    group.add_argument(
        flag,
        choices=(*MODES, *(more or {})),
        help=f"whether each {window} begins with the BOS token; {AUTO}: if the tokenizer adds it, or if it clearly "
        f"lowers the dense model's perplexity{others} (default: {default})",
    )


def add_memory(group: Any) -> None:
    """Adds where a run keeps weights and how much memory it may use."""
    group.add_argument(
        "--offload",
        default="auto",
        choices=OFFLOAD,
        help="disk: read and write one block at a time; auto: only if the model does not fit in memory; none: never "
        "(default: %(default)s)",
    )
    group.add_argument("--max-memory", metavar="SIZE", help="limit on the process's resident memory, e.g. 2GB")


def add_reports(group: Any, each: str) -> None:
    """Adds the page and the log. ``each``: the noun for what the log has one line for."""
    group.add_argument("--report", metavar="FILE.html", type=Path, help="write an HTML page about the run")
    group.add_argument("--log-json", metavar="FILE", help=f"write a JSON line for each {each}; - for stderr")


def open_log(args: argparse.Namespace, opened: contextlib.ExitStack) -> TextIO | None:
    """The file of ``--log-json``; None without one. ``opened`` closes it.

    Raises:
        InputError: the file cannot be written.
    """
    if args.log_json in (None, "-"):
        return sys.stderr if args.log_json else None
    from ace_ext.cli.log_file import LogFile  # imported here: most runs write no log

    return opened.enter_context(LogFile.open(args.log_json))


def check_written(args: argparse.Namespace) -> None:
    """Checks the files that a run writes in addition to its output, before it starts.

    Raises:
        InputError: one of them is in the output folder, cannot be written, or would replace a file of a different kind;
            or two are the same.
    """
    output = output_path(args.output)
    if args.report is not None:
        from ace_ext.reporting.html import check_report  # imported here: most runs write no page

        check_report(args.report)
        check_outside(output, "report", args.report)
    if args.log_json not in (None, "-"):
        check_replaceable("log-json", Path(args.log_json), "log of ace-prune", is_log)
        check_outside(output, "log-json", Path(args.log_json))
    files = [args.report, args.log_json, getattr(args, "save_stats", None)]
    given = [os.path.realpath(file) for file in files if file not in (None, "-")]
    if len(set(given)) < len(given):
        raise InputError(f"report, log-json and save-stats must be different files (got {', '.join(given)})")


def request_from(args: argparse.Namespace, **options: Any) -> RunRequest:
    """The request of ``run`` and ``plan`` from parsed arguments.

    Args:
        args: with the arguments of :func:`add_model`, :func:`add_pruning`, :func:`add_calibration`, :func:`add_memory`.
        options: further fields of :class:`ace_ext.runs.options.RunOptions`.

    Raises:
        InputError: a value is not valid, or the run would not read it.
    """
    config, stored = config_from(args), options.get("stats") is not None
    names = ("calibration", "nsamples", "seqlen", "seed", "text_field", "bos", "evaluate")
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if stored and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"a run from --stats reads no calibration text (got {flags}); leave out one of them")
    source = given.pop("calibration", BUNDLED)
    reader = None if args.text_field is not None else reader_of(source)
    if reader is not None:
        check_only_media(source, given)
        given["reader"] = reader
    else:
        given["text_field"] = text_field_of(args, args.calibration, args.evaluate)
    given.setdefault("bos", default_mode(config.method.published, source == SELF))
    given.setdefault("evaluate", EVALUATE_AUTO)
    budget = None if args.max_memory is None else parse_bytes(args.max_memory)
    run_options = RunOptions(offload=args.offload, max_memory=budget, **options)
    kind = Calibration if reader is None else InputCalibration
    return RunRequest(args.model, config, kind(source, **given), run_options, pick_device(args.device), args.dtype)


def check_only_media(source: str, given: dict[str, Any]) -> None:
    """Raises :class:`InputError` if options of a text are given with images or sound."""
    of_texts = [f"--{name}" for name in ("seqlen", "bos") if name in given]
    if of_texts:
        raise InputError(f"{', '.join(of_texts)} is for texts, and {source} has images or sound; leave it out")


def note(args: argparse.Namespace, text: object) -> None:
    """Writes a line about the work to stderr, unless ``--quiet``."""
    if not args.quiet:
        print(f"ace-prune: {text}", file=sys.stderr)


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether to show a progress bar: on a terminal, unless ``--quiet``."""
    return not args.quiet and sys.stderr.isatty()
