"""``ace-prune eval``: perplexity of a model on held-out text."""

import argparse
import json

from ace_ext.cli import args as shared
from ace_ext.data.perplexity import SEQLEN, perplexity
from ace_ext.data.windows import evaluation_tokens
from ace_ext.models.loading import load_model


def add(commands: shared.Subparsers) -> None:
    """Adds the verb to the command line."""
    parser = commands.add_parser("eval", help="perplexity of a model on held-out text")
    shared.add_model(parser)
    parser.add_argument("--text", required=True, help="wiki-mini, news-mini, wikitext2, c4, FILE.txt or FILE.jsonl")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="read at most this many tokens (default: all)")
    parser.set_defaults(action=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    loaded = load_model(args.model, args.dtype, shared.device_of(args))
    tokens = evaluation_tokens(args.text, loaded.tokenizer, text_field=args.text_field)
    result = perplexity(loaded.model, tokens, args.seqlen, args.max_tokens, progress=shared.shows_progress(args))
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **result.to_dict()}))
    else:
        print(f"perplexity {result.perplexity:.3f} on {args.text}: {result.windows} windows of {result.seqlen} tokens")
    return 0
