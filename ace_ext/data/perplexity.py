"""Perplexity over fixed windows: the figure by which pruned models are compared."""

import math
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ace_ext.errors import InputError

SEQLEN = 512
"""Tokens of an evaluation window, unless told otherwise."""
BATCH_TOKENS = 2048
"""Tokens that are evaluated together, at least one window."""


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of each window's tokens but its first. Always quote all of it: the
    window length alone moves the figure."""

    perplexity: float
    nll: float
    windows: int
    seqlen: int
    tokens: int
    """Predicted tokens: ``windows * (seqlen - 1)``."""

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: nn.Module, tokens: Tensor, seqlen: int = SEQLEN, max_tokens: int | None = None, progress: bool = False
) -> Perplexity:
    """Perplexity of ``tokens [n]`` cut into consecutive windows of ``seqlen``; a rest shorter than one is left out.

    Args:
        max_tokens: use whole windows of at most this many tokens from the start.
        progress: a bar on stderr.

    Raises:
        InputError: no whole window, or ``seqlen`` below 2 (nothing to predict).
    """
    if seqlen < 2:
        raise InputError(f"seqlen must be at least 2: a window's first token is not predicted (got {seqlen})")
    usable = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    windows = usable // seqlen
    if windows == 0:
        raise InputError(f"the text must hold one window of {seqlen} tokens (got {usable}); lower seqlen")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    batches = tokens[: windows * seqlen].view(windows, seqlen).split(max(1, BATCH_TOKENS // seqlen))
    for batch in tqdm(batches, desc="perplexity", unit="batch", disable=not progress, file=sys.stderr):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(training)
    count = windows * (seqlen - 1)
    return Perplexity(math.exp(total / count), total / count, windows, seqlen, count)
