"""``ace-prune eval``: perplexity of a model on held-out text."""

import argparse
import json

from ace_ext.cli import args as shared
from ace_ext.cli.parser import VERBS
from ace_ext.data.bos import AUTO, choose_bos
from ace_ext.data.corpora import SOURCES
from ace_ext.data.evaluation import text_perplexity
from ace_ext.data.perplexity import SEQLEN
from ace_ext.engine.devices import pick_device
from ace_ext.errors import counted
from ace_ext.runs.bos_choice import recorded_in_report
from ace_ext.runtime import open_model

EXAMPLES = (
    "eval --model MODEL --text wiki-mini",
    "eval --model pruned --text text.txt --seqlen 1024 --max-tokens 65536",
)
"""Commands that ``--help`` shows."""


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("eval", help=VERBS["eval"])
    shared.add_model(parser)
    parser.add_argument("--text", "--texts", required=True, help=f"{', '.join(SOURCES)}, FILE.txt or FILE.jsonl")
    shared.add_text_field(parser)
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="maximum number of tokens to read (default: all)")
    shared.add_bos(parser, "window", f"{AUTO}; for a pruned folder the choice of its run")
    parser.set_defaults(action=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    field = shared.text_field_of(args, args.text)
    loaded = open_model(args.model, args.dtype, pick_device(args.device))
    mode = args.bos or AUTO
    choice = recorded_in_report(args.model, mode) or choose_bos(mode, loaded.tokenizer, loaded.model)
    result = text_perplexity(
        loaded.model,
        loaded.tokenizer,
        args.text,
        args.seqlen,
        max_tokens=args.max_tokens,
        bos=choice,
        text_field=field,
        progress=shared.shows_progress(args),
    )
    shared.note(args, choice)
    if args.json:
        figures = {"model": args.model, "text": args.text, **result.to_dict()}
        print(json.dumps(figures | {"bos_choice": choice.to_dict()}))
    else:
        windows = counted(result.windows, "window")
        print(f"perplexity {result.perplexity:.3f} on {args.text}: {windows} of {result.seqlen} tokens")
    return 0
