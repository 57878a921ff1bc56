"""The text of ``remove``, and what it does not go with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ace_ext import InputError, PruneConfig
from ace_ext.pruning.removal import (
    BLOCK_SCORES,
    PUBLISHED,
    SCORES,
    Blocks,
    Experts,
    Heads,
    Neurons,
    Removal,
    removal_of,
)

shares = st.floats(0.01, 0.99)
choices = (shares, st.sampled_from([*SCORES]), st.sampled_from(["matrix", "none"]))
neurons = st.builds(Neurons, *choices, st.none() | st.integers(1, 512))
heads = st.builds(Heads, *choices)
published = st.builds(Neurons, shares, st.sampled_from([*PUBLISHED]))
blocks = st.builds(Blocks, shares | st.integers(1, 100), st.sampled_from([*BLOCK_SCORES]))


@given(st.none() | neurons | published, st.none() | heads, st.none() | st.builds(Experts, shares), st.none() | blocks)
def test_the_text_of_a_removal_is_read_back(part, attention, experts, depth):
    parts = tuple(found for found in (depth, experts, attention, part) if found is not None)
    if parts:
        assert removal_of(str(Removal(parts))) == Removal(parts)


def test_params_stands_alone():
    assert str(removal_of(" params = 0.2 ")) == "params=0.2"


def test_the_order_of_the_text_does_not_matter():
    assert removal_of("neurons=0.2+blocks=2") == removal_of(" blocks = 2 + neurons = 0.2 ")


@pytest.mark.parametrize(
    ("share", "multiple", "count", "kept"),
    [
        (0.2, None, 8192, 6656),
        (0.2, None, 1536, 1216),
        (0.25, None, 48, 36),
        (0.5, None, 15, 8),
        (0.2, 32, 1536, 1216),
        (0.2, 1, 1536, 1229),
    ],
)
def test_sizes_are_rounded_to_a_multiple(share, multiple, count, kept):
    assert Neurons(share, multiple=multiple).kept(count) == kept


@pytest.mark.parametrize(("share", "multiple"), [(0.99, None), (0.01, 256), (0.9, 4096)])
def test_sizes_that_cannot_be_reached_are_refused(share, multiple):
    with pytest.raises(InputError, match="give another share or multiple"):
        Neurons(share, multiple=multiple).kept(1024 if multiple else 2)


BAD = [
    ("", "must be parts"),
    ("neurons", "must be parts"),
    ("neurons=", "must be parts"),
    ("neurons=0.2 +", "must be parts"),
    ("neurons=0.2, blocks=1", "must be parts"),
    ("neurons=x", "must be a number"),
    ("neurons=²", "must be a number"),
    ("neurons=1_0", "must be a number"),
    ("neurons=0", "between 0 and 1"),
    ("neurons=1", "between 0 and 1"),
    ("neurons=nan", "between 0 and 1"),
    ("neurons=inf", "between 0 and 1"),
    ("neurons=-0.2", "between 0 and 1"),
    ("neurons=20", "did you mean 0.2"),
    ("neuron=0.2", "did you mean neurons"),
    ("params=2", "params must be a share between 0 and 1"),
    ("params=0.2 + neurons=0.1", "give it alone"),
    ("params=0.2(score=obs)", "has no option score"),
    ("towers=0.2", "is not one of"),
    ("experts=0.2(score=obs)", "has no option score: it has none"),
    ("heads=2", "heads must be a share between 0 and 1"),
    ("heads=0.2(multiple=2)", "heads has no option multiple"),
    ("neurons=0.2 + neurons=0.3", "given twice"),
    ("neurons=0.2(score=wanda)", "score must be one of"),
    ("neurons=0.2(multiple=0)", "multiple must be"),
    ("neurons=0.2(multiple=1.5)", "multiple must be"),
    ("neurons=0.2(scor=obs)", "has no option scor"),
    ("neurons=0.2(score=obs, score=obs)", "given twice"),
    ("neurons=0.2(score)", "options must be"),
    ("blocks=0", "a share between 0 and 1 or a whole number"),
    ("blocks=-1", "a share between 0 and 1 or a whole number"),
    ("blocks=1.5", "a share between 0 and 1 or a whole number"),
    ("blocks=nan", "a share between 0 and 1 or a whole number"),
    ("blocks=1(score=obs)", "score must be one of"),
    ("blocks=1(refit=none)", "blocks has no option refit"),
    ("neurons=0.2(score=published-shortgpt)", "score must be one of"),
    ("neurons=0.2(score=published-flap, refit=none)", "leave out refit=none"),
    ("heads=0.2(refit=none, score=published-osscar)", "leave out refit=none"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_texts_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        PruneConfig(remove=text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "balanced"}, "give sparsity or pattern"),
        ({"method": "wanda + distill"}, "give sparsity or pattern"),
        ({"group": "matrix"}, "group is for zeros"),
        ({"skip": "x"}, r"skip \(--exclude\) is for zeros"),
        ({"max_dense": 0.5}, "max_dense is for zeros"),
    ],
)
def test_arguments_that_remove_does_not_go_with(arguments, words):
    with pytest.raises(InputError, match=words):
        PruneConfig(remove="neurons=0.2", **arguments)


def test_zeros_follow_only_if_they_are_asked_for():
    alone, zeros = PruneConfig(remove="blocks=1"), PruneConfig(remove="blocks=1", pattern="2:4")
    rounded = PruneConfig("quantize", remove="blocks=1")
    assert (alone.only_removes, zeros.only_removes, rounded.only_removes) == (True, False, False)
    assert (alone.sparsity, zeros.sparsity, rounded.sparsity) == (0.0, 0.5, 0.0)
    assert alone.to_dict()["method"] == ""
    assert alone.changed().to_dict() == alone.to_dict()
    assert zeros.without_removal().to_dict() == PruneConfig(pattern="2:4").to_dict()
    assert "remove" not in PruneConfig().to_dict()


def test_distill_alone_writes_no_zeros_after_a_removal():
    alone, zeros = PruneConfig("distill", remove="blocks=1"), PruneConfig("distill", 0.5, remove="blocks=1")
    assert (alone.to_dict()["method"], zeros.to_dict()["method"]) == ("distill", "wanda + distill")
    assert (alone.sparsity, zeros.sparsity) == (0.0, 0.5)
    assert alone.without_distillation().to_dict() == PruneConfig(remove="blocks=1").to_dict()
    assert PruneConfig("distill").to_dict()["method"] == "wanda + distill"
