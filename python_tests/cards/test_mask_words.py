"""What chose the mask, in words."""

import pytest

from ace_ext.cards.card import UNUSED, mask_words
from ace_ext.pruning.method import PRESETS, PUBLISHED
from ace_ext.pruning.metrics import METRICS


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("admm", f"ADMM's remaining error; {UNUSED}"),
        ("admm(gram=cosine) + distill", f"ADMM's remaining error of tokens weighted as in the cosine score; {UNUSED}"),
        ("obs", f"OBS's remaining error; {UNUSED}"),
        ("wanda", f"wanda scores; {UNUSED}"),
        ("wanda + swaps + admm", f"wanda scores, exchanged by swaps; {UNUSED}"),
        ("ace", "the product of the paper's two scores, cosine and variance"),
        ("varp + mean-swaps", "the paper's variance score, exchanged by mean-swaps"),
        ("my_score", f"a metric of the caller's; {UNUSED}"),
    ],
)
def test_words(method, words):
    assert mask_words(method) == words


def test_every_method_has_words():
    scored = [name for name in METRICS if UNUSED not in mask_words(name)]
    assert scored == ["stade", "cosp", "cosp-exact", "cosvar", "norm-cosvar", "ace", "varp"]
    assert all(UNUSED in mask_words(text) for text in (PRESETS | PUBLISHED).values())
