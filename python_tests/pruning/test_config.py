"""The configuration: defaults, the effects of group and pattern, the statistics that it needs, and its errors."""

import json

import numpy as np
import pytest

from ace_ext import InputError, PruneConfig, SparsityPattern
from ace_ext.pruning.groups import keep_count
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, ROUNDING_GRAM, SHARED_GRAM, SKETCH, WEIGHTED
from ace_ext.pruning.stages import Admm, Collect, Distill, Score


@pytest.mark.parametrize(
    ("size", "sparsity", "keep"),
    [(10, 0.5, 5), (11, 0.5, 5), (10, 0.25, 7), (3, 1 / 3, 2), (7, 0.0, 7), (7, 1.0, 0), (0, 0.5, 0), (1, 0.49, 1)],
)
def test_keep_count_rounds_the_pruned_half_up(size, sparsity, keep):
    assert keep_count(size, sparsity) == keep


def test_defaults():
    config = PruneConfig()
    assert (config.method.label, config.sparsity, config.group, config.order) == ("fast", 0.5, "row", "sequential")


def test_skip_may_be_one_pattern_or_none():
    assert PruneConfig(skip="q_proj").skip == ("q_proj",)
    assert PruneConfig(skip=None).skip == ()


def test_pattern_sets_sparsity():
    config = PruneConfig(pattern="1:4")
    assert config.pattern == SparsityPattern(1, 4)
    assert config.sparsity == 0.75
    assert config.to_dict()["pattern"] == "1:4"
    assert PruneConfig(pattern="1:4", sparsity=0.75).sparsity == 0.75


@pytest.mark.parametrize(
    ("method", "group"),
    [
        ("wanda", "row"),
        ("admm", "row"),
        ("obs", "matrix"),
        ("wanda + obs", "row"),
        ("wanda + swaps + obs", "row"),
        ("wanda + mean-update", "row"),
        ("published-sparsegpt", "matrix"),
    ],
)
def test_the_group_is_that_of_the_stage_that_chooses_the_mask(method, group):
    assert PruneConfig(method).group == group
    assert PruneConfig(method, pattern="2:4").group == "row"
    assert PruneConfig(method, group="row").group == "row"


def test_group_model_walks_dense_blocks():
    config = PruneConfig("wanda", group="model")
    assert (config.order, config.token_norm) == ("block", "exact")


@pytest.mark.parametrize(
    ("method", "order", "token_norm"),
    [
        ("ace", "sequential", "sketch"),
        ("collect(order=block) + ace", "block", "exact"),
        ("collect(token_norm=exact) + ace", "sequential", "exact"),
        ("collect(order=block, token_norm=sketch) + ace", "block", "sketch"),
    ],
)
def test_the_order_decides_how_tokens_are_weighted(method, order, token_norm):
    config = PruneConfig(method)
    assert (config.order, config.token_norm) == (order, token_norm)


def test_samples_of_a_batch():
    assert PruneConfig().batch_samples(128) == 128
    assert PruneConfig("collect(batch_tokens=64) + wanda").batch_samples(16) == 4
    assert PruneConfig("collect(batch_tokens=64) + wanda").batch_samples(100) == 1


MUST_BE_SHARE = "sparsity must be a share from 0 to 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, f"{MUST_BE_SHARE} (got 1.5); did you mean 0.015?"),
        ({"sparsity": 50}, f"{MUST_BE_SHARE} (got 50); did you mean 0.5?"),
        ({"sparsity": 101}, f"{MUST_BE_SHARE} (got 101)"),
        ({"sparsity": -0.1}, f"{MUST_BE_SHARE} (got -0.1)"),
        ({"sparsity": float("nan")}, f"{MUST_BE_SHARE} (got nan)"),
        ({"sparsity": True}, f"{MUST_BE_SHARE} (got True)"),
        ({"sparsity": "half"}, f"{MUST_BE_SHARE} (got 'half')"),
        ({"sparsity": "x" * 1000}, f"{MUST_BE_SHARE} (got '{'x' * 99})"),
        ({"max_dense": 2}, "max_dense must be a share from 0 to 1 (got 2); did you mean 0.02?"),
        ({"max_dense": None}, "max_dense must be a share from 0 to 1 (got None)"),
        ({"pattern": (2, 4)}, 'pattern must be N:M, N weights kept of M (got (2, 4)); e.g. "2:4"'),
        ({"pattern": 24}, 'pattern must be N:M, N weights kept of M (got 24); e.g. "2:4"'),
        ({"skip": 3}, "skip must be regular expressions (got 3)"),
        ({"pattern": "2:4", "sparsity": 0.6}, "give sparsity or pattern, not both (got 0.6 and 2:4)"),
        (
            {"pattern": "2:4", "group": "matrix"},
            "group does not go with a pattern, which has its own groups (got 'matrix'); leave out group",
        ),
        ({"group": "column"}, "group must be one of row, matrix, model (got 'column')"),
        ({"group": "modelz"}, "group must be one of row, matrix, model (got 'modelz'); did you mean model?"),
        (
            {"method": "wanda + swaps", "group": "matrix"},
            "swaps compares within a row (got group 'matrix'); use group row",
        ),
        ({"method": "admm", "group": "matrix"}, "admm compares within a row (got group 'matrix'); use group row"),
        (
            {"method": "wanda + swaps + obs", "group": "matrix"},
            "swaps compares within a row (got group 'matrix'); use group row",
        ),
        (
            {"method": "obs", "group": "model"},
            "obs compares within a row or a matrix (got group 'model'); use group matrix",
        ),
        (
            {"method": "wanda + quantize", "group": "model"},
            "quantize compares within a row or a matrix (got group 'model'); use group row",
        ),
        *[
            (
                {"method": "quantize(bits=8)", name: value},
                f"{name} is for methods that prune, and quantize(bits=8) only quantizes (got {value}); leave out "
                f"{name}, or add a stage that prunes, as in balanced + quantize(bits=8)",
            )
            for name, value in (("sparsity", 0.5), ("pattern", "2:4"), ("group", "matrix"))
        ],
        (
            {"method": "wanda + mean-swaps", "group": "model"},
            "mean-swaps compares within a row or a matrix (got group 'model'); use group row",
        ),
        (
            {"method": "wanda + train", "group": "model"},
            "train trains block after block, but group model prunes all at once; use group row",
        ),
        (
            {"method": "collect(order=sequential) + wanda", "group": "model"},
            "group model compares all scores at once; leave out order=sequential",
        ),
        (
            {"method": "allocate + wanda", "pattern": "2:4"},
            "allocate cannot move weights between N:M groups; leave out pattern or allocate",
        ),
        (
            {"method": "allocate + wanda", "group": "model"},
            "group model already divides the sparsity among blocks; leave out allocate, or use group row",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(InputError) as caught:
        PruneConfig(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[(text, rf"N:M with 0 < N < M <= 32, N weights kept of M \(got {text}\)") for text in ("3:2", "0:4", "2:64")],
        *[(text, rf"N:M, N weights kept of M \(got '{text}'\)") for text in ("two:four", "2:4:8", "2")],
    ],
)
def test_bad_patterns_are_named(text, message):
    with pytest.raises(InputError, match=f"^pattern must be {message}; e.g. 2:4$"):
        PruneConfig(pattern=text)


def test_arguments_that_do_not_exist():
    with pytest.raises(TypeError, match="sparsty"):
        PruneConfig(sparsty=0.5)
    with pytest.raises(TypeError, match="damping"):
        PruneConfig("balanced", damping=0.5)


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("wanda", {INPUT}),
        ("magnitude", set()),
        ("admm", {INPUT, SHARED_GRAM}),  # the report compares with Wanda's mask
        ("magnitude + admm", {SHARED_GRAM}),
        ("magnitude + admm(gram=plain)", {GRAM}),
        ("admm(gram=sketch)", {INPUT, SKETCH}),
        ("cosvar + swaps(gram=cosine)", {WEIGHTED, COSINE_GRAM}),
        ("wanda + train", {INPUT}),
        ("quantize", {ROUNDING_GRAM}),
        ("quantize(gram=plain)", {GRAM}),
        ("magnitude + quantize", {ROUNDING_GRAM}),
        ("balanced + quantize", {INPUT, COSINE_GRAM}),  # all stages read the Gram matrix of quantize
        ("fast + quantize", {INPUT, COSINE_GRAM}),
        ("quantize(bits=8)", {SHARED_GRAM}),
        ("quantize(bits=8, gram=cosine)", {ROUNDING_GRAM}),
        ("balanced + quantize(bits=8)", {INPUT, SHARED_GRAM}),  # as without quantize
        ("balanced + quantize(bits=8, gram=cosine)", {INPUT, COSINE_GRAM}),
        ("fast + quantize(bits=8)", {INPUT, SHARED_GRAM}),
        ("fast + quantize(gram=plain)", {INPUT, GRAM}),
    ],
)
def test_only_stages_that_read_it_need_a_gram_matrix(method, needs):
    assert PruneConfig(method).needs.prune == needs


def test_to_dict_is_what_was_asked_for():
    config = PruneConfig("balanced", np.float32(0.25), group="row", skip="q_proj")
    assert json.loads(json.dumps(config.to_dict())) == {
        "method": "admm",
        "preset": "balanced",
        "sparsity": 0.25,
        "pattern": None,
        "group": "row",
        "skip": ["q_proj"],
        "max_dense": 0.1,
    }
    assert PruneConfig("balanced(damping=0.2)").to_dict()["preset"] is None


def test_changed_keeps_the_other_arguments():
    config = PruneConfig("ria", group="matrix", sparsity=0.25, skip="q_proj", max_dense=0.5)
    expected = {**config.to_dict(), "sparsity": 0.75}
    assert config.changed(sparsity=0.75).to_dict() == expected
    pattern = PruneConfig("balanced", pattern="2:4")
    assert pattern.changed(skip="x").to_dict() == {**pattern.to_dict(), "skip": ["x"]}


def test_a_method_that_only_quantizes_has_no_zeros_to_ask_for():
    config = PruneConfig("quantize(bits=4)")
    assert (config.sparsity, config.pattern, config.group) == (0.0, None, "row")
    assert config.changed(skip="x").sparsity == 0.0
    assert PruneConfig("quantize(bits=4)", sparsity=0.0).to_dict() == config.to_dict()
    assert PruneConfig("allocate + quantize").sparsity == 0.5  # Wanda's scores choose a mask
    assert not config.method.prunes


def test_without_distillation():
    config = PruneConfig("best")
    assert config.without_distillation().method.stages == (Admm(),)
    assert config.method.stages == (Admm(), Distill())
    plain = PruneConfig("balanced")
    assert plain.without_distillation() is plain


def test_saved_statistics_are_of_dense_blocks():
    config = PruneConfig("balanced", 0.25).on_dense_blocks()
    assert config.method.stages == (Collect(order="block"), Admm())
    assert config.sparsity == 0.25
    assert PruneConfig("collect(batch_tokens=64) + wanda").on_dense_blocks().method.stages == (
        Collect(order="block", batch_tokens=64),
        Score("wanda"),
    )
    published = PruneConfig("published-wanda")
    assert published.on_dense_blocks() is published
    with pytest.raises(
        InputError,
        match=r"^saved statistics are of dense blocks; leave out order=sequential, or write order=block$",
    ):
        PruneConfig("collect(order=sequential) + wanda").on_dense_blocks()


@pytest.mark.parametrize("given", ["batch_tokens=5", "token_norm=sketch"])
def test_a_file_of_statistics_has_been_collected(given):
    config = PruneConfig(f"collect(order=block, {given}) + ace")
    assert config.on_dense_blocks() == config
    with pytest.raises(InputError, match=rf"^{given.split('=')[0]} says how statistics are collected, and those of"):
        config.from_statistics()


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({"remove": "neurons=0.25"}, 1.0),
        ({"remove": "neurons=0.25", "method": "distill"}, 1.0),
        ({"remove": "neurons=0.25", "sparsity": 0.5}, 0.3),
        ({"remove": "neurons=0.25", "method": "quantize(bits=8)"}, 0.3),
        ({}, 0.3),
    ],
)
def test_what_may_stay_dense_has_a_limit_only_where_weights_are_pruned(given, limit):
    if limit < 1:
        given = {**given, "max_dense": limit}
    assert PruneConfig(**given).dense_limit == limit
