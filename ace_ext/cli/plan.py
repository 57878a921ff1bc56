"""``ace-prune plan``: what a run would prune, and the memory and time it would take."""

import argparse

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.formats import DEFAULT_FORMAT, FORMATS
from ace_ext.runs.listing import as_json, as_text, list_weights
from ace_ext.runs.plan import make_plan
from ace_ext.runs.shapes_only import KNOWN_SIZES

EXAMPLES = (
    "plan --model MODEL --method balanced",
    "plan --model MODEL --pattern 2:4 --calibration wiki-mini --max-memory 8GB",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser(
        "plan",
        help=VERBS["plan"],
        epilog=shared.preset_table(),
    )
    shared.add_model(
        parser,
        help="a folder, of which config.json suffices, a .gguf file, a hub name, or a known size: "
        f"{', '.join(KNOWN_SIZES)}",
    )
    parser.add_argument("--format", choices=FORMATS, default=DEFAULT_FORMAT, help="as for run (default: %(default)s)")
    shared.add_pruning(parser)
    shared.add_calibration(parser)
    shared.add_memory(parser.add_argument_group("the run"))
    parser.add_argument("--list", action="store_true", help="only list the weights of the blocks, and which stay dense")
    parser.show_common(
        *("model", "method", "sparsity", "pattern", "remove", "calibration", "nsamples", "seqlen", "device"),
        *("max_memory", "format", "list", "json"),
        tables=shared.stage_tables,
    )
    parser.set_defaults(action=plan)


def plan(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    request = shared.request_from(args, format=args.format)
    if args.list:
        weights = list_weights(request)
        print(as_json(weights) if args.json else as_text(weights))
        return 0
    planned = (request.model, request.config, request.calibration, request.options, request.device, request.dtype)
    found = make_plan(*planned, lambda text: shared.note(args, text))
    print(found.to_json() if args.json else found.table())
    return 0
