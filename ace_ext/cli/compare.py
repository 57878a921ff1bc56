"""``ace-prune compare``: a table of methods × sparsities × calibration lengths × sources × seeds on one model."""

import argparse
from pathlib import Path

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.compare.grid import BOTH, EVAL_WINDOWS, Evaluation, Grid, Study
from ace_ext.compare.runner import run_study
from ace_ext.compare.tables import markdown_table, results_json, text_table
from ace_ext.data.bos import AUTO, NEVER
from ace_ext.data.corpora import BUNDLED
from ace_ext.data.media_items import is_media
from ace_ext.data.perplexity import SEQLEN
from ace_ext.data.requests import check_int
from ace_ext.data.tasks import Tasks
from ace_ext.engine.devices import pick_device
from ace_ext.errors import InputError
from ace_ext.pruning.groups import GROUPS
from ace_ext.pruning.method import Method, parse_list
from ace_ext.reporting.compare_page import write_study_report
from ace_ext.reporting.plots import require_matplotlib
from ace_ext.runs.options import Calibration

EXAMPLES = (
    'compare --model MODEL --methods "published-wanda; fast; balanced" --calibration wiki-mini',
    "compare --model MODEL --tasks local",
    "compare --model MODEL --calibration wiki-mini --tasks arc_easy,piqa --task-limit 200",
    'compare --model MODEL --methods "wanda; ace" --sparsities 0.5,0.6 --patterns 2:4 --seeds 0,1,2 --output C',
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser(
        "compare",
        help=VERBS["compare"],
        epilog=f"{shared.preset_table()}\n\nstages: see ace-prune run --help-all",
    )
    shared.add_model(parser)
    shared.add_text_field(parser)
    parser.add_argument(
        "--methods",
        default="published-wanda; fast",
        help="a list of methods, separated by ; (see run --help; default: %(default)s)",
    )
    parser.add_argument("--sparsities", "--sparsity", help="a list of shares of zeros, e.g. 0.5,0.6 (default: 0.5)")
    parser.add_argument("--patterns", "--pattern", help="a list of N:M, N kept of M consecutive inputs, e.g. 2:4,4:8")
    parser.add_argument("--lengths", help="a list of nsamples x seqlen, e.g. 64x128,16x512 (default: 128x128)")
    default = Calibration()
    parser.add_argument("--nsamples", type=int, help=f"instead of --lengths: samples (default: {default.nsamples})")
    parser.add_argument(
        "--seqlen", type=int, help=f"instead of --lengths: tokens of a sample (default: {default.seqlen})"
    )
    parser.add_argument("--calibration", default=BUNDLED, help="a list of texts, see run --help (default: %(default)s)")
    both = {BOTH: f"published-* with {NEVER} and again with {AUTO}"}
    shared.add_bos(parser, "calibration sample", f"{AUTO}; {NEVER} for published-*", more=both)
    parser.add_argument("--seeds", "--seed", default="0", help="a list, e.g. 0,1,2 (default: %(default)s)")
    parser.add_argument(
        "--texts",
        "--text",
        default="wiki-mini",
        help="a list of texts to evaluate on (default: %(default)s), or of folders or .jsonl files of images or sound",
    )
    parser.add_argument("--eval-seqlen", type=int, help=f"tokens of a window (default: {SEQLEN})")
    parser.add_argument(
        "--eval-windows", type=int, default=EVAL_WINDOWS, help="maximum number of windows (default: %(default)s)"
    )
    shared.add_bos(parser, "window of an evaluation text", AUTO, "--eval-bos")
    _add_tasks(parser.add_argument_group("downstream tasks (pip install 'lm-eval[hf]')"))
    parser.add_argument(
        "--group",
        choices=GROUPS,
        help="which weights are compared with each other for a share of zeros; a pattern has its own groups",
    )
    shared.add_selection(parser, "weights to leave dense")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for runs.jsonl, results.json, report.html and plots; a later call continues from its contents",
    )
    parser.add_argument("--markdown", action="store_true", help="a markdown table on stdout")
    parser.set_defaults(action=compare)


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", help="a list of lm-eval tasks, or local: five small ones that need no hub")
    group.add_argument(
        "--task-path",
        metavar="DIR",
        type=Path,
        help="a folder with YAML files of your own tasks; Python code in it is run",
    )
    group.add_argument(
        "--task-limit", metavar="N", type=int, help="maximum number of samples of each task (default: all)"
    )


def study_from(args: argparse.Namespace) -> Study:
    """The study of the parsed arguments of ``compare``. Raises InputError for a value that is not valid."""
    methods = parse_list(args.methods)
    _check_prunes(args, methods)
    amounts = (*_split(args.sparsities), *_split(args.patterns)) or ("0.5",)
    if args.group and all(":" in amount for amount in amounts):
        raise InputError(
            f"group does not go with patterns, which have their own groups (got {args.group!r}); leave out group"
        )
    calibrations, texts = _split(args.calibration), _split(args.texts)
    if not texts:
        raise InputError(f"texts must name a text, or images or sound (got {args.texts!r})")
    _check_kinds(args, calibrations, texts)
    return Study(
        model=args.model,
        grid=Grid(
            methods=methods,
            amounts=amounts,
            lengths=_lengths(args, any(map(is_media, calibrations))),
            calibrations=calibrations,
            seeds=tuple(_whole("seeds", text) for text in _split(args.seeds)),
            bos=args.bos,
        ),
        evaluation=Evaluation(
            texts,
            SEQLEN if args.eval_seqlen is None else args.eval_seqlen,
            args.eval_windows,
            args.eval_bos or AUTO,
            Tasks(_split(args.tasks), args.task_path, args.task_limit),
        ),
        skip=shared.skip_from(args),
        text_field=shared.text_field_of(args, *calibrations, *texts),
        dtype=args.dtype,
        groups={method.label: args.group for method in methods if args.group and method.prunes},
    )


def _check_kinds(args: argparse.Namespace, calibrations: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Raises :class:`InputError` for images or sound beside texts, or with options of a text."""
    of_media = [is_media(source) for source in (*calibrations, *texts)]
    if not any(of_media):
        return
    if not all(of_media):
        other = next(source for source, media in zip((*calibrations, *texts), of_media, strict=True) if not media)
        raise InputError(
            f"calibration and texts must all be images or sound, or all texts (got {other!r} beside images or sound); "
            "give both options"
        )
    for name in ("lengths", "seqlen", "eval_seqlen", "bos", "eval_bos", "text_field"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise InputError(f"{flag} is for texts, and {calibrations[0]} has images or sound; leave it out")


def _check_prunes(args: argparse.Namespace, methods: tuple[Method, ...]) -> None:
    """Raises :class:`InputError` if a target is given, but no method prunes."""
    if any(method.prunes for method in methods):
        return
    for name in ("sparsities", "patterns", "group"):
        if getattr(args, name):
            raise InputError(
                f"{name} is for methods that prune, and these only quantize (got {getattr(args, name)!r}); leave out "
                f"{name}, or add a method that prunes"
            )


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _lengths(args: argparse.Namespace, media: bool) -> tuple[tuple[int, int], ...]:
    """The lengths of ``--lengths``, or the one of ``--nsamples`` and ``--seqlen``; ``media``: of images or sound."""
    default = Calibration()
    if media:
        nsamples = default.nsamples if args.nsamples is None else args.nsamples
        check_int("nsamples", nsamples, 1)
        return ((nsamples, 0),)
    if args.lengths is None:
        nsamples, seqlen = (
            own if given is None else given
            for given, own in ((args.nsamples, default.nsamples), (args.seqlen, default.seqlen))
        )
        return (parse_length(f"{nsamples}x{seqlen}"),)
    if args.nsamples is not None or args.seqlen is not None:
        raise InputError(f"give lengths, or nsamples and seqlen, not both (got lengths {args.lengths!r})")
    return tuple(parse_length(text) for text in _split(args.lengths))


def parse_length(text: str) -> tuple[int, int]:
    """``(nsamples, seqlen)`` of a text like ``"64x128"``. Raises InputError for any other text."""
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
    """Runs the verb; returns the exit status."""
    if args.json and args.markdown:
        raise InputError("--json and --markdown exclude each other; give one")
    study = study_from(args)
    output = Path(args.output).expanduser() if args.output else None
    if output is not None:
        require_matplotlib()
    results = run_study(study, pick_device(args.device), output, shared.shows_progress(args))
    if results.bos is not None and any(run.bos is not None for run in results.runs):
        shared.note(args, results.bos)
    if output is not None:
        write_study_report(results, output)
    if args.json:
        print(results_json(results), end="")
    else:
        print(markdown_table(results) if args.markdown else text_table(results))
    return 0
