"""Calibration text that the model itself writes, one sampled token after the other."""

import math
import sys
import time
from collections.abc import Callable
from numbers import Real

import torch
from torch import nn
from tqdm import tqdm

from ace_ext.data.bos import check_known
from ace_ext.data.requests import check_int, check_positions, check_predicts, check_request, seeded_generator
from ace_ext.errors import InputError
from ace_ext.models._transformers import cache_arguments, embedding_weight
from ace_ext.models.products import float32_products
from ace_ext.models.run_mode import evaluating
from ace_ext.models.tokenizer import Tokenizer

ROWS_TOGETHER = 16
"""Rows of text that the model writes in one batch."""


def self_generated(
    model: nn.Module,
    tokenizer: Tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = ROWS_TOGETHER,
    bos: bool = True,
    progress: bool = False,
) -> torch.Tensor:
    """Return text that the model writes: int64 [nsamples, seqlen], on the CPU.

    Each row starts with the tokenizer's BOS token. Without one, or without `bos`, it starts with the EOS token, else
    with a random token. The rest is sampled from the model's own distribution to the full length, past any EOS. One
    random number is drawn for each token beforehand. So a seed gives the same text for every batch size and device (up
    to rounding in the model's logits). `progress`: a bar on stderr. The global random state and the modules' training
    modes do not change.

    Raises:
        InputError: numbers out of range, more tokens than the model has positions for, a first token that the model
            does not know, logits that are not finite.
    """
    check_request(nsamples, seqlen, seed)
    check_int("batch_size", batch_size, 1)
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: {temperature!r} found; use a finite number above 0 (1 is the model's own)")
    _check_writes(model, seqlen)
    generator = seeded_generator(seed)
    starts = (tokenizer.bos_token_id if bos else None, tokenizer.eos_token_id)
    first = _first_tokens(model, starts, len(tokenizer), nsamples, generator)
    draws = torch.rand(nsamples, seqlen - 1, dtype=torch.float64, generator=generator)
    bar = tqdm(total=draws.numel(), desc="writing text", unit="token", disable=not progress, file=sys.stderr)
    with evaluating(model), bar:  # dropout would change the text and draw from the global random state
        rows = [
            _write(model, first[i : i + batch_size], draws[i : i + batch_size], temperature, bar.update)
            for i in range(0, nsamples, batch_size)
        ]
    return torch.cat(rows)


def _check_writes(model: nn.Module, seqlen: int) -> None:
    check_positions(model, seqlen)
    check_predicts(model, "it cannot write its own text: give another --calibration, such as a file")


def writing_note(model: nn.Module, nsamples: int, seqlen: int) -> str:
    """A line about :func:`self_generated` with the same numbers: how much text ``model`` will write, and about how long
    this will take. A trial of two tokens measures the time.

    Raises:
        InputError: as :func:`self_generated` would, of the model.
    """
    _check_writes(model, seqlen)
    rows = min(nsamples, ROWS_TOGETHER)
    start = time.perf_counter()
    with evaluating(model):
        for _ in range(2):  # the first try includes loading of libraries
            start = time.perf_counter()
            _write(model, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 2, dtype=torch.float64), 1.0)
    step = (time.perf_counter() - start) / 2
    seconds = step * math.ceil(nsamples / ROWS_TOGETHER) * (seqlen - 1)
    return (
        f"the model writes {nsamples * seqlen:,} tokens of calibration text (about {seconds:,.0f} s); pass "
        "--calibration TEXT to avoid this"
    )


def _first_tokens(
    model: nn.Module, starts: tuple[int | None, ...], vocabulary: int, nsamples: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the token each row starts with, int64 [nsamples]: the first of `starts` that is not None, or random
    ones."""
    for start in starts:
        if start is not None:
            check_known(start, model)
            return torch.full((nsamples,), start)
    return torch.randint(0, min(len(embedding_weight(model)), vocabulary), (nsamples,), generator=generator)


@torch.no_grad()
def _write(
    model: nn.Module,
    first: torch.Tensor,
    draws: torch.Tensor,
    temperature: float,
    written: Callable[[int], object] = lambda _: None,
) -> torch.Tensor:
    """Continue each row's first token [rows] by one token for each column of draws [rows, n] (uniform in [0, 1)), and
    return int64 [rows, n + 1]. `written` is called with the number of tokens after each step."""
    device = next(model.parameters()).device
    draws = draws.to(device)
    tokens = first[:, None].to(device)
    news = tokens
    cache: dict[str, object] = {}
    finite = torch.ones((), dtype=torch.bool, device=device)
    for draw in torch.split(draws, 1, dim=1):
        with float32_products(model):
            output = model(input_ids=news, use_cache=True, **cache)
        # float64: in float32 the running sum over a large vocabulary would lose the rare tokens.
        logits = output.logits[:, -1].to(device, torch.float64)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        running = probabilities.cumsum(dim=-1)
        total = running[:, -1:]
        finite &= total.isfinite().all()
        # right=True skips tokens of probability 0; the clamp is for a product rounded up to the total, and for NaN.
        news = torch.searchsorted(running, draw * total, right=True).clamp_(max=running.shape[1] - 1)
        tokens = torch.cat([tokens, news], dim=1)
        written(len(news))
        cache = cache_arguments(output)
        if not cache:
            news = tokens  # a model that returns no cache reads the whole row again
    if not finite:
        raise InputError("model: its logits hold NaN or infinity, so it cannot write text; use another source")
    return tokens.cpu()
