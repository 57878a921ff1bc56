"""Arguments that several verbs share. Pruning options come from the registries, so a new solver's options appear
without a change here."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from ace_ext.cli.selection import add_selection, skip_from
from ace_ext.data.bos import AUTO, MODES, NEVER, default_mode
from ace_ext.data.corpora import SELF, SOURCES
from ace_ext.engine.devices import pick_device
from ace_ext.errors import InputError
from ace_ext.models.loading import WEIGHT_DTYPES
from ace_ext.process_memory import parse_bytes
from ace_ext.pruning.config import PruneConfig, all_settings, config_settings
from ace_ext.pruning.criteria import METRICS, RENAMED
from ace_ext.pruning.presets import DEFAULT_PRESET, PRESETS, PUBLISHED, RENAMED_PRESETS, preset_config
from ace_ext.pruning.settings import Setting
from ace_ext.pruning.solver_config import UPDATES, option_help, solver_names, solver_settings, update_names
from ace_ext.pruning.solvers import MaskSolver, Solver, solvers_of
from ace_ext.reporting.html import check_report
from ace_ext.runs.options import EVALUATE_AUTO, EVALUATE_NEVER, OFFLOAD, Calibration, RunOptions, RunRequest
from ace_ext.runs.output import check_outside, output_path
from ace_ext.runs.own_files import check_replaceable, is_log

Subparsers = Any
"""What ``add_subparsers`` returns; the class is private to argparse."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, like every other error of this program."""

    def parse_args(self, *arguments: Any, **more: Any) -> Any:
        """As in argparse, whose older versions take ``--option=--`` for an empty list."""
        found = super().parse_args(*arguments, **more)
        for name, value in vars(found).items():
            if (value == [] and name != "skip") or (isinstance(value, list) and [] in value):
                self.error(f"argument --{name.replace('_', '-')}: expected a value (got '--')")
        return found

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_remote_code(parser: argparse.ArgumentParser) -> None:
    """Adds the permission to run code that comes with a model; :func:`ace_ext.cli.main.main` reads it."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code among the model's files, if it needs any"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, how it is loaded, and the options of every verb that loads one."""
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, or a hub name")
    add_remote_code(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=["auto", *WEIGHT_DTYPES], help="dtype of the weights")
    parser.add_argument("--text-field", default="text", help="the field of a .jsonl line (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes on stderr")


def add_pruning(parser: argparse.ArgumentParser) -> None:
    """Adds all settings of :class:`ace_ext.PruneConfig`, from their declarations."""
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--preset",
        choices=[*PRESETS, *PUBLISHED, *RENAMED_PRESETS],
        metavar="NAME",
        help=f"named settings: {', '.join((*PRESETS, *PUBLISHED))}; other options given here replace them (default: "
        f"{DEFAULT_PRESET}, unless metric, group or a solver are given)",
    )
    own = config_settings()
    group.add_argument(
        "--metric", choices=[*METRICS, *RENAMED], metavar="NAME", help=f"{own['metric'].help}; see below"
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, help=setting_help(own["sparsity"]))
    amount.add_argument("--pattern", help=own["pattern"].help)
    add_selection(group, own["skip"].help)
    for name, setting in own.items():
        if name not in ("metric", "sparsity", "pattern", "skip"):
            add_setting(group, setting, setting_help(setting))
    _add_solvers(parser.add_argument_group("solvers, which follow the metric (see below)"))


def _add_solvers(group: Any) -> None:
    names = solver_names()
    group.add_argument("--refine", choices=[*solvers_of(MaskSolver)], help=names["refine"].help)
    group.add_argument(
        "--update",
        action="append",
        metavar="NAME",
        help=f"{names['update'].help}: {', '.join(update_names())}, or several joined by + (or given several times)",
    )
    add_setting(group, names["gram"], setting_help(names["gram"]))
    for name, setting in solver_settings().items():
        if setting.flag:
            add_setting(group, setting, option_help(name))


def add_setting(group: Any, setting: Setting, help: str) -> None:
    """Adds a flag whose value is None if it is not given: the configuration knows the defaults."""
    flag = f"--{setting.name.replace('_', '-')}"
    if setting.choices:
        group.add_argument(flag, choices=setting.choices, help=help)
        return
    kind = next(kind for kind in (int, float, str) if kind in setting.types)
    group.add_argument(flag, type=kind, help=help)


def setting_help(setting: Setting) -> str:
    """A setting's help with its default."""
    return setting.help if setting.default is None else f"{setting.help} (default: {setting.default})"


def pruning_tables() -> str:
    """The metrics and solvers by name with a description each, for the end of a help text."""
    metrics = {name: metric.formula for name, metric in METRICS.items()}
    tables = [("metrics", metrics)]
    kinds: list[type[Solver]] = [MaskSolver, *UPDATES]
    for kind in kinds:
        tables.append((kind.stage, {solver.name: solver.summary for solver in solvers_of(kind).values()}))
    return "\n\n".join(table(title, lines) for title, lines in tables)


def examples(*commands: str) -> str:
    """Commands to start from, for the end of a help text."""
    return "examples:\n" + "\n".join(f"  ace-prune {command}" for command in commands)


def table(title: str, lines: dict[str, str]) -> str:
    """A title, then names and their descriptions in aligned columns."""
    width = max(map(len, lines))
    return f"{title}:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items())


def config_from(args: argparse.Namespace) -> PruneConfig:
    """The configuration of the parsed arguments: the preset's settings, replaced by every option that was given.

    Raises:
        InputError: as :class:`ace_ext.PruneConfig`, or ``--tune-epochs`` without a solver that trains.
    """
    given = {name: getattr(args, name) for name in all_settings() if getattr(args, name, None) is not None}
    given["skip"] = skip_from(args)
    if "" in given.get("update", ()):
        raise InputError("update must be the name of a solver (got ''); see --help")
    if "update" in given:
        given["update"] = "+".join(given["update"])
    if "tune_epochs" in given and args.preset is None and "tune" not in given.get("update", ""):
        raise InputError("tune-epochs is for --update tune; give both, or neither")
    own_way = {"metric", "group", *solver_names(), *solver_settings()} & given.keys()
    if args.preset is None and own_way:
        return PruneConfig(**given)
    return preset_config(args.preset or DEFAULT_PRESET, **given)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the calibration text and its amount."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        default="self",
        help=f"self (the model writes it), {', '.join(SOURCES)}, FILE.txt or FILE.jsonl (default: self); text is taken "
        "as it is, no chat template is applied",
    )
    add_bos(group, "sample", f"{AUTO}; {NEVER} with the preset of a published method")
    default = Calibration()
    group.add_argument(
        "--evaluate",
        default=EVALUATE_AUTO,
        metavar="TEXT",
        help=f"measure perplexity before and after on a few windows of this text; {EVALUATE_NEVER}: not at all; "
        f"{EVALUATE_AUTO}: of text that was held back (default: %(default)s)",
    )
    group.add_argument("--nsamples", type=int, default=default.nsamples, help="samples (default: %(default)s)")
    group.add_argument("--seqlen", type=int, default=default.seqlen, help="tokens of a sample (default: %(default)s)")
    group.add_argument("--seed", type=int, default=default.seed, help="seed of the sampling (default: %(default)s)")


def add_bos(group: Any, window: str, default: str, flag: str = "--bos") -> None:
    """Adds whether windows begin with the BOS token. The value is None if the flag is not given."""
    group.add_argument(
        flag,
        choices=MODES,
        help=f"whether each {window} begins with the BOS token; {AUTO}: if the tokenizer adds it, or if it clearly "
        f"lowers the dense model's perplexity (default: {default})",
    )


def add_memory(group: Any) -> None:
    """Adds where weights are kept and how much memory a run may use."""
    group.add_argument(
        "--offload",
        default="auto",
        choices=OFFLOAD,
        help="disk: read and write one block at a time; auto: only if the model does not fit (default: %(default)s)",
    )
    group.add_argument("--max-memory", metavar="SIZE", help="limit of the process's resident memory, e.g. 2GB")


def add_reports(group: Any, each: str) -> None:
    """Adds the page and the log; ``each``: of what the log has a line."""
    group.add_argument("--report", metavar="FILE.html", type=Path, help="write an HTML page about the run")
    group.add_argument("--log-json", metavar="FILE", help=f"write a JSON line for each {each}; - for stderr")


def check_written(args: argparse.Namespace) -> None:
    """Checks the files that a run writes beside its output, before it starts.

    Raises:
        InputError: one of them is in the output folder, cannot be written, or would replace a file of another kind; or
            two are the same.
    """
    output = output_path(args.output)
    if args.report is not None:
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
        InputError: a value is not valid.
    """
    budget = None if args.max_memory is None else parse_bytes(args.max_memory)
    bos = args.bos or default_mode(args.preset in (*PUBLISHED, *RENAMED_PRESETS), args.calibration == SELF)
    numbers = (args.nsamples, args.seqlen, args.seed)
    calibration = Calibration(args.calibration, *numbers, args.text_field, bos, args.evaluate)
    run_options = RunOptions(offload=args.offload, max_memory=budget, **options)
    return RunRequest(args.model, config_from(args), calibration, run_options, device_of(args), args.dtype)


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names. Raises InputError if it cannot be used."""
    return pick_device(args.device)


def note(args: argparse.Namespace, text: object) -> None:
    """Writes a line about the work to stderr, unless ``--quiet``."""
    if not args.quiet:
        print(f"ace-prune: {text}", file=sys.stderr)


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether to show a progress bar: on a terminal, unless ``--quiet``."""
    return not args.quiet and sys.stderr.isatty()
