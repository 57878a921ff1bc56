"""From text to token windows: what a model is calibrated on and evaluated on."""

import math
from numbers import Real

import torch

from ace_ext.data.requests import _check_int, _check_request, _generator
from ace_ext.errors import InputError

ROWS_TOGETHER = 16
"""How many rows of text the model writes together."""


def self_generated(
    model, tokenizer, nsamples: int, seqlen: int, seed: int, temperature: float = 1.0, batch_size: int = ROWS_TOGETHER
) -> torch.Tensor:
    """Return text that the model writes: int64 [nsamples, seqlen], on the CPU.

    Each row starts with the tokenizer's BOS token (else its EOS, else a random token) and is sampled from the model's
    own distribution to the full length, past any EOS. One random number is drawn for each token beforehand, so a seed
    gives the same text whatever the batch size or the device (up to rounding in the model's logits). The global random
    state is untouched, and so are the modules' training modes.
    Raises InputError for numbers out of range, more tokens than the model has positions for, a start token that the
    model does not know, and logits that are not finite.
    """
    _check_request(nsamples, seqlen, seed)
    _check_int("batch_size", batch_size, 1)
    if not (isinstance(temperature, Real) and math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: {temperature!r} found; use a finite number above 0 (1 is the model's own)")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise InputError(f"seqlen: {seqlen} found, but the model has {positions} positions; use {positions} or less")

    generator = _generator(seed)
    first = _first_tokens(model, tokenizer, nsamples, generator)
    draws = torch.rand(nsamples, seqlen - 1, dtype=torch.float64, generator=generator)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would change the text and draw from the global random state
    try:
        rows = [
            _write(model, first[i : i + batch_size], draws[i : i + batch_size], temperature)
            for i in range(0, nsamples, batch_size)
        ]
    finally:
        for module in training:
            module.training = True
    return torch.cat(rows)


def _first_tokens(model, tokenizer, nsamples: int, generator: torch.Generator) -> torch.Tensor:
    """Return the token each row starts with, int64 [nsamples]."""
    known = model.get_input_embeddings().weight.shape[0]
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            if start >= known:
                raise InputError(
                    f"tokenizer: its first token has id {start}, but the model knows ids below {known}; "
                    "pass the tokenizer that belongs to the model"
                )
            return torch.full((nsamples,), start)
    return torch.randint(0, min(known, len(tokenizer)), (nsamples,), generator=generator)


@torch.no_grad()
def _write(model, first: torch.Tensor, draws: torch.Tensor, temperature: float) -> torch.Tensor:
    """Continue each row's first token [rows] by one token a draw [rows, n], uniform in [0, 1): int64 [rows, n + 1]."""
    draws = draws.to(model.device)
    tokens = first[:, None].to(model.device)
    news, past = tokens, {}
    finite = torch.ones((), dtype=torch.bool, device=model.device)
    for draw in draws.split(1, dim=1):
        output = model(input_ids=news, use_cache=True, **past)
        # float64: in float32 the running sum over a large vocabulary would swallow its rare tokens.
        logits = output.logits[:, -1].to(model.device, torch.float64)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        running = probabilities.cumsum(dim=-1)
        total = running[:, -1:]
        finite &= total.isfinite().all()
        # right=True skips tokens of probability 0; the clamp is for a product rounded up to the total, and for NaN.
        news = torch.searchsorted(running, draw * total, right=True).clamp_(max=running.shape[1] - 1)
        tokens = torch.cat([tokens, news], dim=1)
        past = _past(output)
        if not past:
            news = tokens  # a model that returns no cache reads the whole row again
    if not finite:
        raise InputError("model: its logits hold NaN or infinity, so it cannot write text; use another source")
    return tokens.cpu()


def _past(output) -> dict:
    """Return the keyword under which the next call takes the model's cache, or nothing without one."""
    for name in ("cache", "past_key_values"):  # its name today, and its name in older transformers
        if getattr(output, name, None) is not None:
            return {name: getattr(output, name)}
    return {}
