"""Whether calibration and evaluation windows begin with the tokenizer's BOS token.

Some models were trained with this token before each text and are of little use without it: Gemma 3 270M has a
perplexity of 89.8 without it and of 32.8 with it (``ace-prune eval --text wiki-mini --max-tokens 6144``,
``--bos never`` and ``always``). Others were trained without it, and it harms them. ``auto`` adds the token if the
tokenizer does, and else measures the model.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ace_ext.data.requests import positions_of
from ace_ext.errors import InputError
from ace_ext.models._transformers import embedding_weight, output_head, predicts_tokens
from ace_ext.models.products import float32_products
from ace_ext.models.run_mode import evaluating
from ace_ext.models.tokenizer import Tokenizer

AUTO, ALWAYS, NEVER = MODES = ("auto", "always", "never")
"""What a user may ask for."""

WINDOWS, WINDOW_TOKENS = 2, 128
"""Upper bounds for the text on which ``auto`` measures a model. The logits of twice as many windows are in memory
together: 270 MB in bfloat16 with a vocabulary of 262,144 tokens."""

HELPS = 1.1
"""``auto`` adds the token if the perplexity without it is more than this many times the perplexity with it. On the text
below the ratio is 11.8 for Gemma 3 270M, 0.98 for SmolLM2-135M and 0.59 for Qwen2.5-Coder-0.5B. If the token means
nothing to a model, the standard error of the ratio over the 254 predicted tokens is about 3 %."""

_TEXT = """\
The lighthouse stands at the end of a narrow road, three miles from the nearest village. Until 1962 a keeper lived there
with his family; since then the lamp has been run by a machine that is checked twice a year. On clear days visitors can
see the islands in the west, and in winter the waves reach the lower windows.

A good loaf of bread needs only flour, water, salt and time. Mix the flour with most of the water and let it rest for an
hour before the salt is added. The dough should be soft but not wet. Fold it every thirty minutes, then leave it in a
cool place overnight, and bake it in a hot oven until the crust is dark brown.

Light from the sun takes about eight minutes to reach the earth. When it enters the air, small particles scatter blue
light more strongly than red light, which is why the sky looks blue at noon and red in the evening. On the moon there is
no air, so the sky is black even when the sun is shining.

The committee met on Tuesday to discuss the plans for a new bridge. Several members said that the old one could be
repaired for less than half the price, but the engineers warned that its foundations would not last another twenty
years. A decision is expected in the spring, after the people of both towns have been asked for their opinion."""
# All runs use one text. So the choice does not depend on the calibration or evaluation text.

_NO_ENGLISH = "the tokenizer does not add it, and knows too few English words for the model to be measured"
_NO_HEAD = "the tokenizer does not add it, and a model without an LM head cannot be measured"
_NO_TOKENIZER = "there is no tokenizer yet"
_MEASURING = "its tokenizer has a BOS token and does not add it, so the model must be measured"


@dataclass(frozen=True)
class BosChoice:
    """Whether windows begin with the BOS token, and why."""

    mode: str
    """What was asked for, one of :data:`MODES`."""
    token: int | None
    """The id with which each window begins; None: windows are text alone."""
    why: str

    @property
    def decided(self) -> bool:
        """False if the choice needs a measurement of the model, or a tokenizer, and this was not available."""
        return self.why not in (_MEASURING, _NO_TOKENIZER)

    def to_dict(self) -> dict[str, str | int | None]:
        """The fields as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.decided:
            return f"bos {self.mode}: undecided ({self.why})"
        begins = "no BOS token" if self.token is None else f"each window begins with token {self.token}"
        return f"bos {self.mode}: {begins} ({self.why})"


def default_mode(published: bool, own_text: bool) -> str:
    """The mode for calibration if none is given. ``published``: the method is a published one; the code of these
    methods calibrates on windows without the token. ``own_text``: the model writes the text, unlike in that code."""
    return NEVER if published and not own_text else AUTO


def choose_bos(
    mode: str,
    tokenizer: Tokenizer,
    model: nn.Module | None = None,
    *,
    own_text: bool = False,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> BosChoice:
    """Decides whether windows begin with the BOS token. With ``auto`` those of a network that does not predict the next
    token begin with its tokenizer's own first token, if it has one.

    Args:
        mode: ``always``, ``never`` or ``auto``. With ``auto``: no, if there is no BOS token; yes, if the tokenizer
            begins each text with it; else yes if it lowers the model's perplexity (:data:`HELPS`).
        tokenizer: the model's.
        model: the dense model. Without one, ``auto`` may stay undecided.
        own_text: the model writes the text. It has to begin with some token, so ``auto`` takes the BOS token if there
            is one.
        logits: ``(tokens [batch, seqlen] int64) -> [batch, seqlen, vocabulary]``, for a model that is not in memory as
            a whole; None: the model is called.

    Raises:
        InputError: another mode, ``always`` without a BOS token, or a tokenizer of another model.
    """
    if mode == AUTO and model is not None and not predicts_tokens(model):
        first = getattr(tokenizer, "cls_token_id", None)
        why = "the texts of an encoder begin with this token" if first is not None else "it predicts no next token"
        return BosChoice(mode, first, why)
    choice = settled_bos(mode, tokenizer, own_text)
    if model is None:
        return choice or BosChoice(mode, None, _MEASURING)
    if choice is None and output_head(model) is None:
        return BosChoice(mode, None, _NO_HEAD)
    if choice is None:
        return _measured(tokenizer, model, logits or _logits_of(model))
    if choice.token is not None:
        check_known(choice.token, model)
    return choice


def settled_bos(mode: str, tokenizer: Tokenizer, own_text: bool = False) -> BosChoice | None:
    """The choice if the mode and the tokenizer settle it; None if the model must be measured. Arguments and errors as
    :func:`choose_bos`."""
    if mode not in MODES:
        raise InputError(f"bos: {mode!r} found; use one of {', '.join(MODES)}")
    token = tokenizer.bos_token_id
    if mode == NEVER:
        return BosChoice(mode, None, "as set, or the default of a published method")
    if token is None:
        if mode == ALWAYS:
            raise InputError("bos: 'always' found, but the tokenizer has no BOS token; use auto or never")
        return BosChoice(mode, None, "the tokenizer has none")
    if mode == ALWAYS:
        return BosChoice(mode, token, "as set")
    if own_text:
        return BosChoice(mode, token, "text that the model writes begins with it")
    if tokenizer(_TEXT, verbose=False)["input_ids"][:1] == [token]:
        return BosChoice(mode, token, "the tokenizer begins each text with it")
    return None if knows_english(tokenizer) else BosChoice(mode, None, _NO_ENGLISH)


def undecided_bos(mode: str) -> BosChoice:
    """The choice if there is no tokenizer: undecided."""
    return BosChoice(mode, None, _NO_TOKENIZER)


def short_text_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids, without special tokens, of the English text on which ``auto`` measures a model."""
    return text_ids(_TEXT, tokenizer)


def knows_english(tokenizer: Tokenizer) -> bool:
    """Whether most of that text is made of tokens that the tokenizer knows."""
    ids = short_text_ids(tokenizer)
    unknown = sum(token == getattr(tokenizer, "unk_token_id", None) for token in ids)
    return len(ids) >= 2 * WINDOWS and 2 * unknown <= len(ids)


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text without special tokens. If the tokenizer adds a BOS token nevertheless, it is removed."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose: warns that the text is long
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def begin_with(token: int | None, windows: Tensor) -> Tensor:
    """Windows ``[n, tokens]`` with ``token`` before each, ``[n, tokens + 1]``; unchanged if ``token`` is None."""
    return windows if token is None else functional.pad(windows, (1, 0), value=token)


def check_known(token: int, model: nn.Module) -> None:
    """Raises :class:`InputError` if the model's embedding does not know a token id."""
    known = len(embedding_weight(model))
    if token >= known:
        raise InputError(
            f"tokenizer: its first token has id {token}, but the model knows ids below {known}; "
            "pass the tokenizer that belongs to the model"
        )


@torch.no_grad()
def _measured(tokenizer: Tokenizer, model: nn.Module, logits: Callable[[Tensor], Tensor]) -> BosChoice:
    """The choice by the model's perplexity on windows of one text, with and without the token. The targets are the same
    in both: all tokens of a window but the first. (Without the BOS token, nothing precedes that one.)"""
    token = tokenizer.bos_token_id
    assert token is not None  # else it was settled
    check_known(token, model)
    ids = short_text_ids(tokenizer)
    check_known(max(ids), model)
    positions = positions_of(model) or WINDOW_TOKENS + 1
    size = min(WINDOW_TOKENS, len(ids) // WINDOWS, positions - 1)
    windows = torch.tensor(ids[: WINDOWS * size]).view(WINDOWS, size)
    # One batch, so that a model on the disk is read once. Windows without the token get one more token at their end;
    # no other token attends to it.
    batch = torch.cat([begin_with(token, windows), functional.pad(windows, (0, 1), value=token)])
    with evaluating(model):
        found = logits(batch)
    with_token = perplexity_of(found[:WINDOWS, 1:-1], windows[:, 1:])
    without = perplexity_of(found[WINDOWS:, :-2], windows[:, 1:])
    helps = without > HELPS * with_token  # False with NaN
    why = f"perplexity {with_token:.2f} with it and {without:.2f} without it, on a short text"
    return BosChoice(AUTO, token if helps else None, why)


def _logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(tokens: Tensor) -> Tensor:
        with float32_products(model):
            found: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
        return found

    return forward


def perplexity_of(logits: Tensor, targets: Tensor) -> float:
    """The perplexity of ``targets [windows, tokens]`` by ``logits [windows, tokens, vocabulary]``. It is computed
    window by window, because float32 logits of a large vocabulary take much memory."""
    losses = [
        functional.cross_entropy(row.float(), target.to(row.device)).item()
        for row, target in zip(logits, targets, strict=True)
    ]
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf
