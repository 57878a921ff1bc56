import json
import math

import pytest
import torch
from tiny_models import VOCABULARY, make_model, make_tokens
from torch.nn import functional

from ace_ext import InputError
from ace_ext.data.perplexity import perplexity


def test_equals_a_plain_loop():
    model, tokens = make_model("llama"), make_tokens(1, 100)[0]
    losses = []
    with torch.no_grad():
        for start in range(0, 96, 16):
            window = tokens[start : start + 16]
            logits = model(window[None]).logits[0]
            losses += [functional.cross_entropy(logits[t], window[t + 1]).item() for t in range(15)]
    result = perplexity(model, tokens, seqlen=16)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.seqlen, result.tokens) == (6, 16, 90)


def test_max_tokens_takes_whole_windows():
    model, tokens = make_model("llama"), make_tokens(1, 100)[0]
    assert perplexity(model, tokens, 16, max_tokens=50) == perplexity(model, tokens[:48], 16)


def test_uniform_model():
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, make_tokens(1, 64)[0], 16).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


@pytest.mark.parametrize(
    ("seqlen", "length", "message"),
    [
        (1, 50, "use a whole number of at least 2"),
        (64, 50, r"one window of 64 tokens \(got 50\)"),
        (16, 0, r"\(got 0\)"),
    ],
)
def test_too_little_text(seqlen, length, message):
    with pytest.raises(InputError, match=message):
        perplexity(make_model("llama"), torch.zeros(length, dtype=torch.long), seqlen)


def test_logits_that_are_not_finite_are_an_error():
    model = make_model("llama")
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(InputError, match="its logits hold NaN or infinity, so it has no perplexity"):
        perplexity(model, make_tokens(1, 64)[0], 16)


def test_a_perplexity_beyond_a_float_is_null_in_json():
    model = make_model("llama")
    model.lm_head.weight.data *= 1e6
    found = perplexity(model, make_tokens(1, 64)[0], 16)
    assert found.perplexity == math.inf
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["perplexity"] is None
    assert written["nll"] > 700


def test_tokens_may_be_int32():
    model, tokens = make_model("llama"), make_tokens(1, 100)[0]
    assert perplexity(model, tokens.int(), seqlen=16) == perplexity(model, tokens, seqlen=16)
