"""Perplexity over consecutive windows of a text: the figure by which pruned models are compared."""

import math
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ace_ext.data.bos import begin_with
from ace_ext.data.requests import check_int, check_positions, check_predicts, check_tokens
from ace_ext.errors import InputError
from ace_ext.models.products import float32_products
from ace_ext.models.run_mode import evaluating
from ace_ext.records import finite

SEQLEN = 512
"""Tokens of an evaluation window, unless told otherwise."""
BATCH_TOKENS = 2048
"""Tokens that are evaluated together, at least one window."""


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of each window's tokens except its first. Always quote the window
    length, the number of windows and the BOS token too: the figure depends on them."""

    perplexity: float
    nll: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    windows: int
    seqlen: int
    """Tokens of a window."""
    tokens: int
    """Predicted tokens: ``windows * (seqlen - 1)``."""
    bos: int | None = None
    """The token with which each window begins; None: the windows are text alone."""

    def to_dict(self) -> dict[str, float | None]:
        """The fields as JSON values. A perplexity beyond a float's range is None; ``nll`` is its logarithm."""
        return asdict(self) | {"perplexity": finite(self.perplexity)}


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    seqlen: int = SEQLEN,
    max_tokens: int | None = None,
    progress: bool = False,
    bos: int | None = None,
) -> Perplexity:
    """Perplexity of ``tokens [n]`` cut into consecutive windows of ``seqlen`` tokens; the remainder is dropped.

    Args:
        model: a causal language model; called with ``input_ids [batch, seqlen]``, it returns ``logits``.
        tokens: int64 ``[n]``, text without special tokens.
        seqlen: tokens of a window.
        max_tokens: the tokens of all windows together are at most this many; None: all windows.
        progress: a bar on stderr.
        bos: a token before each window, counted among its ``seqlen`` tokens. Then all text of a window is predicted.
            None: a window is text alone, and its first token is not predicted.

    Raises:
        InputError: no whole window; ``seqlen`` below 2 (nothing to predict) or above the model's positions; tokens that
            the model does not know; logits that are not finite.
    """
    check_int("seqlen", seqlen, 2, ": a window's first token is not predicted")
    check_positions(model, seqlen)
    check_predicts(model, "it has no perplexity: evaluate it on its own task")
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, seqlen, ", a whole window")
    check_tokens(model, tokens)
    width = seqlen if bos is None else seqlen - 1
    windows = len(tokens) // width
    if max_tokens is not None:
        windows = min(windows, max_tokens // seqlen)
    if windows == 0:
        usable = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
        raise InputError(f"the text must hold one window of {seqlen} tokens (got {usable}); lower seqlen")
    device = next(model.parameters()).device
    total = 0.0
    whole = begin_with(bos, tokens[: windows * width].long().view(windows, width))
    batches = torch.split(whole, max(1, BATCH_TOKENS // seqlen))
    with evaluating(model):
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=not progress, file=sys.stderr):
            batch = batch.to(device)
            with float32_products(model):
                logits = model(batch, use_cache=False).logits[:, :-1].float()
            total += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    if not math.isfinite(total):
        raise InputError("model: its logits hold NaN or infinity, so it has no perplexity; check its weights")
    count = windows * (seqlen - 1)
    mean = total / count
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, windows, seqlen, count, bos)
