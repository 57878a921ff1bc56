"""Perplexity of a model on the held-out part of a text, by the text's name."""

from torch import nn

from ace_ext.data.bos import BosChoice, choose_bos
from ace_ext.data.perplexity import SEQLEN, Perplexity, perplexity
from ace_ext.data.windows import evaluation_tokens
from ace_ext.models.tokenizer import Tokenizer


def text_perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    source: str,
    seqlen: int = SEQLEN,
    *,
    max_tokens: int | None = None,
    bos: str | BosChoice = "auto",
    text_field: str = "text",
    progress: bool = False,
) -> Perplexity:
    """The perplexity of a model on a source of text.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        source: as for :func:`ace_ext.data.corpora.load_text`.
        seqlen: tokens of a window.
        max_tokens: the tokens of all windows together are at most this many; None: all windows.
        bos: whether each window begins with the BOS token: ``auto``, ``always``, ``never``, or a choice already made.
            For a pruned model give the choice of the dense one, so that both figures have the same windows.
        text_field: the field of a ``.jsonl`` line that holds the text.
        progress: a bar on stderr.

    Raises:
        InputError: as :func:`ace_ext.data.bos.choose_bos`, :func:`ace_ext.data.windows.evaluation_tokens` and
            :func:`ace_ext.data.perplexity.perplexity`.
    """
    tokens = evaluation_tokens(source, tokenizer, text_field=text_field)
    choice = bos if isinstance(bos, BosChoice) else choose_bos(bos, tokenizer, model)
    return perplexity(model, tokens, seqlen, max_tokens, progress, choice.token)
