"""Errors of the ops: messages name op, argument and index; nothing is written. Contracts: csrc/ops.h, csrc/ops/."""

import math

import pytest
import torch
from helpers import FORMULAS, MOMENT_FORMULAS, assert_same_bits, formula_arguments, prune_at_, score_histogram

from ace_ext import ops

BAD = (math.nan, math.inf, -math.inf)

# Every op that scores a weight, called with (weight, formula, **arguments). The first word is the op.
SCORED = {
    "score": lambda w, m, **kw: ops.score(w, m, **kw),
    "prune_topk_ by row": lambda w, m, **kw: ops.prune_topk_(w, m, 3, **kw),
    "prune_topk_ by matrix": lambda w, m, **kw: ops.prune_topk_(w, m, 3, **kw, group="matrix"),
    "prune_topk_ of none": lambda w, m, **kw: ops.prune_topk_(w, m, 0, **kw),
    "prune_nm_": lambda w, m, **kw: ops.prune_nm_(w, m, 2, 4, **kw),
    "topk_mask by row": lambda w, m, **kw: ops.topk_mask(w, m, 3, **kw),
    "topk_mask by matrix": lambda w, m, **kw: ops.topk_mask(w, m, 3, **kw, group="matrix"),
    "nm_mask": lambda w, m, **kw: ops.nm_mask(w, m, 2, 4, **kw),
    "score_histogram": lambda w, m, **kw: score_histogram(w, m, 0, 0, **kw),
    "prune_at_": lambda w, m, **kw: prune_at_(w, m, 2**31, 2, **kw),
}


def refused(call, op, argument, *parts):
    """The error of ``call``: one line, ``op: argument must ... (got ...)`` with the given parts in it."""
    with pytest.raises(ValueError, match=rf"^{op.split()[0]}: {argument} must .*\(got .*\)$") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def refused_for(value, call, op, argument, place, weight):
    before = weight.clone()
    refused(call, op, argument, "finite", f"got {value} at index [{place}]")
    assert_same_bits(weight, before)


@pytest.fixture
def weight(dtype, random):
    return (torch.randn(40, 12, generator=random) + 3).to(dtype)


# NaN and infinity


@pytest.mark.parametrize("op", SCORED)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("value", BAD)
def test_a_weight_that_is_not_finite(op, formula, value, weight, random):
    arguments = formula_arguments(formula, weight, random)
    weight[17, 5] = weight[17, 6] = weight[39, 0] = value
    refused_for(value, lambda: SCORED[op](weight, formula, **arguments), op, "weight", "17, 5", weight)


@pytest.mark.parametrize("op", SCORED)
@pytest.mark.parametrize("formula", FORMULAS[1:])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
def test_a_column_that_is_not_finite(op, formula, value, zeros, weight, random):
    arguments = formula_arguments(formula, weight, random)
    arguments["column"][7] = arguments["column"][11] = value
    if zeros:
        weight.zero_()
    refused_for(value, lambda: SCORED[op](weight, formula, **arguments), op, "column", "7", weight)


@pytest.mark.parametrize("op", SCORED)
@pytest.mark.parametrize("formula", [*MOMENT_FORMULAS, "score"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
def test_a_moment_that_is_not_finite(op, formula, value, zeros, weight, random):
    arguments = formula_arguments(formula, weight, random) or {"moment": torch.randn(40, 12, generator=random)}
    arguments["moment"][3, 11] = arguments["moment"][4, 0] = value
    if zeros:
        weight.zero_()
    refused_for(value, lambda: SCORED[op](weight, formula, **arguments), op, "moment", "3, 11", weight)


@pytest.mark.parametrize("op", SCORED)
@pytest.mark.parametrize("formula", ["magnitude", "scaled", "cosp"])
def test_the_last_weight_of_many_that_is_not_finite(op, formula, dtype, random):
    # Enough rows for every thread and block: the first must not be written before the last is checked.
    weight = (torch.randn(150, 1136, generator=random) + 3).to(dtype)
    arguments = formula_arguments(formula, weight, random)
    weight[149, 1135] = math.nan
    refused_for(math.nan, lambda: SCORED[op](weight, formula, **arguments), op, "weight", "149, 1135", weight)


@pytest.mark.parametrize("op", SCORED)
def test_a_score_that_overflows(op):
    weight = torch.ones(40, 12)
    weight[21, 2] = 3e38
    before = weight.clone()
    column = torch.full((12,), 2.0)
    refused(lambda: SCORED[op](weight, "scaled", column=column), op, "score", "finite", "overflow", "index [21, 2]")
    moment = torch.full((40, 12), 4.0)
    refused(lambda: SCORED[op](weight, "cosp", column=column, moment=moment), op, "score", "index [21, 2]")
    assert_same_bits(weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_token_weights(value):
    state = [torch.zeros(()), torch.zeros(3), torch.zeros(3)]
    weight = torch.ones(9)
    weight[5] = weight[7] = value
    refused(
        lambda: ops.update_moments_(*state, torch.ones(9, 3), weight), "update_moments_", "token_weight", "index [5]"
    )
    assert all((t == 0).all() for t in state)


# Shapes, dtypes, strides, names and numbers


@pytest.mark.parametrize("op", SCORED)
def test_weights_of_the_wrong_kind(op):
    def refused_weight(weight, *parts):
        refused(lambda: SCORED[op](weight, "magnitude"), op, "weight", *parts)

    refused_weight(torch.ones(12), "2 dimensions", "got 1")
    refused_weight(torch.ones(2, 3, 4), "2 dimensions", "got 3")
    refused_weight(torch.ones(4, 12, dtype=torch.float64), "float32, float16 or bfloat16", "got Double")
    refused_weight(torch.ones(4, 12, dtype=torch.int32), "got Int")
    refused_weight(torch.ones(12, 4).t(), "contiguous columns", "got strides [1, 4]")
    refused_weight(torch.ones(4, 24)[:, ::2], "contiguous columns")
    refused_weight(torch.ones(12).expand(4, 12), "do not overlap", "got strides [0, 1]")
    refused_weight(torch.ones(30).as_strided((4, 12), (6, 1)), "do not overlap")


@pytest.mark.parametrize("op", SCORED)
def test_columns_and_moments_of_the_wrong_kind(op):
    weight, column, moment = torch.ones(4, 12), torch.ones(12), torch.ones(4, 12)

    def call(formula, column=None, moment=None):
        return lambda: SCORED[op](weight, formula, column=column, moment=moment)

    for formula in FORMULAS[1:]:
        needed = moment if formula in MOMENT_FORMULAS else None
        refused(call(formula, None, needed), op, "column", "be given", f"'{formula}'", "got None")
        refused(call(formula, torch.ones(11), needed), op, "column", "shape [12]", "got [11]")
        refused(call(formula, torch.ones(1, 12), needed), op, "column", "shape [12]")
        refused(call(formula, column.half(), needed), op, "column", "Float", "got Half")
        refused(call(formula, torch.ones(24)[::2], needed), op, "column", "contiguous")
        if needed is None:
            refused(call(formula, column, moment), op, "moment", "be None", f"'{formula}'")
        else:
            refused(call(formula, column), op, "moment", "be given", "got None")
            refused(call(formula, column, torch.ones(12, 4)), op, "moment", "shape [4, 12]", "got [12, 4]")
            refused(call(formula, column, torch.ones(12, 4).t()), op, "moment", "contiguous")
            refused(call(formula, column, moment.double()), op, "moment", "Float", "got Double")
    refused(call("magnitude", column), op, "column", "be None")
    refused(call("magnitude", None, moment), op, "moment", "be None")
    refused(call("score", column, moment), op, "column", "be None")
    refused(call("score"), op, "moment", "be given")
    refused(call("wandaa", column), op, "formula", "one of", "magnitude", "scaled", "got 'wandaa'")
    assert (weight == 1).all()


@pytest.mark.parametrize("op", ["prune_topk_", "topk_mask"])
@pytest.mark.parametrize("formula", ["magnitude", "score"])
def test_numbers_to_keep(op, formula):
    def call(weight, keep_k, group):
        moment = torch.ones_like(weight) if formula == "score" else None
        getattr(ops, op)(weight, formula, keep_k, moment=moment, group=group)

    weight = torch.ones(4, 12)
    refused(lambda: call(weight, -1, "row"), op, "keep_k", "from 0 to 12", "got -1")
    refused(lambda: call(weight, 13, "row"), op, "keep_k", "from 0 to 12", "got 13")
    refused(lambda: call(weight, 49, "matrix"), op, "keep_k", "from 0 to 48", "got 49")
    refused(lambda: call(weight, 3, "column"), op, "group", "'row' or 'matrix'", "got 'column'")
    assert (weight == 1).all()


@pytest.mark.parametrize("op", ["prune_nm_", "nm_mask"])
@pytest.mark.parametrize("formula", ["magnitude", "score"])
def test_patterns(op, formula):
    def call(weight, keep_n, group_m):
        moment = torch.ones_like(weight) if formula == "score" else None
        getattr(ops, op)(weight, formula, keep_n, group_m, moment=moment)

    weight = torch.ones(4, 12)
    refused(lambda: call(weight, 3, 2), op, "keep_n", "from 0 to 2", "got 3")
    refused(lambda: call(weight, -1, 4), op, "keep_n", "got -1")
    refused(lambda: call(weight, 2, 8), op, "group_m", "divide the 12 columns", "got 8")
    refused(lambda: call(weight, 0, 0), op, "group_m", "from 1 to 32", "got 0")
    refused(lambda: call(weight, 2, -4), op, "group_m", "got -4")
    refused(lambda: call(torch.ones(4, 33), 2, 33), op, "group_m", "from 1 to 32", "got 33")
    assert (weight == 1).all()


def test_own_scores_of_the_wrong_kind():
    for op, numbers in (("prune_topk_", (3,)), ("prune_nm_", (2, 4)), ("topk_mask", (3,)), ("nm_mask", (2, 4))):

        def call(weight, moment, op=op, numbers=numbers):
            return lambda: getattr(ops, op)(weight, "score", *numbers, moment=moment)

        weight = torch.ones(4, 12)
        refused(call(weight, torch.ones(12, 4)), op, "moment", "shape [4, 12]", "got [12, 4]")
        refused(call(weight, torch.ones(4, 12).double()), op, "moment", "Float", "got Double")
        refused(call(weight[0], weight[0]), op, "weight", "2 dimensions")


def test_levels_prefixes_keys_and_ties():
    weight = torch.ones(4, 12)

    def histogram(prefix, level):
        return lambda: score_histogram(weight, "magnitude", prefix, level)

    refused(histogram(0, 3), "score_histogram", "level", "from 0 to 2", "got 3")
    refused(histogram(0, -1), "score_histogram", "level", "got -1")
    refused(histogram(-1, 0), "score_histogram", "prefix", "got -1")
    refused(histogram(2**32, 0), "score_histogram", "prefix", "32-bit", "got 4294967296")
    refused(lambda: prune_at_(weight, "magnitude", 2**32, 0), "prune_at_", "key", "got 4294967296")
    refused(lambda: prune_at_(weight, "magnitude", -1, 0), "prune_at_", "key", "got -1")
    refused(lambda: prune_at_(weight, "magnitude", 0, -1), "prune_at_", "ties", "got -1")
    assert (weight == 1).all()


def test_states_of_the_wrong_kind():
    def call(x, weight_sum, mean, m2, token_weight=None):
        return lambda: ops.update_moments_(weight_sum, mean, m2, x, token_weight)

    op, x, one, three = "update_moments_", torch.ones(5, 3), torch.zeros(()), torch.zeros(3)
    refused(call(x[0], one, three, three), op, "x", "2 dimensions")
    refused(call(x.double(), one, three, three), op, "x", "got Double")
    refused(call(torch.ones(3, 5).t(), one, three, three), op, "x", "contiguous columns")
    refused(call(x, one, three.half(), three), op, "mean", "float32 or float64", "got Half")
    refused(call(x, one.double(), three, three), op, "weight_sum", "Float", "got Double")
    refused(call(x, one, three, three.double()), op, "m2", "Float", "got Double")
    refused(call(x, torch.zeros(1), three, three), op, "weight_sum", "shape []")
    refused(call(x, one, torch.zeros(4), three), op, "mean", "shape [3]", "got [4]")
    refused(call(x, one, three, torch.zeros(4)), op, "m2", "shape [3]", "got [4]")
    refused(call(x, one, torch.zeros(6)[::2], three), op, "mean", "contiguous")
    refused(call(x, one, three, three, torch.ones(4)), op, "token_weight", "shape [5]", "got [4]")
    refused(call(x, one, three, three, torch.ones(5).double()), op, "token_weight", "got Double")


def test_activations_of_the_wrong_kind():
    x, a, moment = torch.ones(5, 3), torch.ones(5, 2), torch.zeros(2, 3)
    op = "update_cosine_moment_"
    refused(lambda: ops.inverse_square_norm(a[0]), "inverse_square_norm", "a", "2 dimensions")
    refused(lambda: ops.inverse_square_norm(a.int()), "inverse_square_norm", "a", "got Int")
    refused(lambda: ops.update_cosine_moment_(moment, x[0], a), op, "x", "2 dimensions")
    refused(lambda: ops.update_cosine_moment_(moment, x, a[:4]), op, "a", "5 tokens", "got 4")
    refused(lambda: ops.update_cosine_moment_(moment, x, a.half()), op, "a", "dtype of x", "got Half")
    refused(lambda: ops.update_cosine_moment_(moment.t(), x, a), op, "moment", "shape [2, 3]", "got [3, 2]")
    refused(lambda: ops.update_cosine_moment_(moment.double(), x, a), op, "moment", "Float", "got Double")
    refused(lambda: ops.update_cosine_moment_(torch.zeros(3, 2).t(), x, a), op, "moment", "contiguous")
    assert (moment == 0).all()


def test_gram_matrices_of_the_wrong_kind():
    gram, x, op = torch.zeros(3, 3), torch.ones(5, 3), "update_gram_"
    refused(lambda: ops.update_gram_(gram, x[0]), op, "x", "2 dimensions")
    refused(lambda: ops.update_gram_(gram, x.int()), op, "x", "got Int")
    refused(lambda: ops.update_gram_(gram, x.t()), op, "x", "columns")
    refused(lambda: ops.update_gram_(torch.zeros(3, 2), x), op, "gram", "shape [3, 3]", "got [3, 2]")
    refused(lambda: ops.update_gram_(gram.double(), x), op, "gram", "Float", "got Double")
    refused(lambda: ops.update_gram_(torch.zeros(3, 6)[:, ::2], x), op, "gram", "contiguous")
    assert (gram == 0).all()


# Solvers


def test_matrices_of_admm_of_the_wrong_kind():
    weight, mask, norm = torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.ones(4)

    def wrong(argument, value, *words):
        given = {"weight": weight, "mask": mask, "dense": weight.clone(), "norm": norm, argument: value}
        change, product = given.pop("change", torch.zeros(3, 4)), given.pop("product", torch.zeros(3, 4))
        if argument != "product":
            refused(lambda: ops.admm_change_(change, **given), "admm_change_", argument, *words)
        if argument != "change":
            refused(
                lambda: ops.admm_update_(product=product, dual_scale=0.4, **given), "admm_update_", argument, *words
            )

    wrong("weight", weight.double(), "got Double")
    wrong("weight", weight[0], "2 dimensions")
    wrong("mask", weight, "Bool", "got Float")
    wrong("mask", mask[:2], "[3, 4]", "got [2, 4]")
    wrong("dense", weight.bfloat16(), "Float", "got BFloat16")
    wrong("dense", torch.ones(4, 3).t(), "contiguous columns")
    wrong("norm", torch.ones(3), "shape [4]", "got [3]")
    wrong("norm", norm.double(), "got Double")
    for other in ("change", "product"):
        wrong(other, weight.half(), "got Half")
        wrong(other, torch.zeros(3, 5), "[3, 4]", "got [3, 5]")
    assert torch.equal(weight, torch.ones(3, 4))


def swap_arguments(weight, gram=None, mask=None):
    cols = weight.shape[-1]
    mask = torch.tensor([True, False]).repeat(weight.shape[0], cols // 2) if mask is None else mask
    return mask, weight, torch.eye(cols) if gram is None else gram


@pytest.mark.parametrize("value", BAD)
def test_swaps_of_what_is_not_finite(value, weight):
    op, gram = "refine_swaps_", torch.eye(12)
    mask, *_ = swap_arguments(weight)
    gram[7, 3] = gram[9, 0] = value
    refused(lambda: ops.refine_swaps_(mask, weight, gram), op, "gram", "finite", f"got {value} at index [7, 3]")
    weight[17, 5] = weight[18, 0] = value
    refused(lambda: ops.refine_swaps_(mask, weight, gram), op, "weight", "finite", f"got {value} at index [17, 5]")
    assert torch.equal(mask, swap_arguments(weight)[0])


def test_swaps_of_the_wrong_kind():
    op, weight = "refine_swaps_", torch.ones(4, 12)
    mask, _, gram = swap_arguments(weight)

    def call(mask, weight, gram, *numbers):
        return lambda: ops.refine_swaps_(mask, weight, gram, *numbers)

    refused(call(mask, weight[0], gram), op, "weight", "2 dimensions")
    refused(call(mask, weight.double(), gram), op, "weight", "got Double")
    refused(call(mask[:3], weight, gram), op, "mask", "shape [4, 12]", "got [3, 12]")
    refused(call(mask.float(), weight, gram), op, "mask", "Bool", "got Float")
    refused(call(mask.t().contiguous().t(), weight, gram), op, "mask", "contiguous columns")
    refused(call(mask[:1].expand(4, 12), weight, gram), op, "mask", "do not overlap")
    refused(call(mask, weight, gram[:, :11]), op, "gram", "shape [12, 12]", "got [12, 11]")
    refused(call(mask, weight, gram.double()), op, "gram", "Float", "got Double")
    refused(call(mask, weight, torch.zeros(12, 24)[:, :12]), op, "gram", "contiguous")
    refused(call(mask, weight, gram.to("meta")), op, "gram", "on cpu", "got meta")
    refused(call(mask, weight, gram, 2, 8), op, "group_m", "divide the 12 columns")
    refused(call(mask, weight, gram, 5, 4), op, "keep_n", "from 0 to 4", "got 5")
    refused(call(mask, weight, gram, 2, 0), op, "group_m", "from 1 to 32", "got 0")
    refused(call(mask, weight, gram, 1, 4), op, "mask", "keep 1 of each 4 columns", "got 2 from index [0, 0] on")
    refused(call(mask, weight, gram, 0, 0, -1), op, "max_swaps", "not be negative", "got -1")


@pytest.mark.parametrize("value", BAD)
def test_a_recursion_over_what_is_not_finite(value):
    op, weight, error = "obs_block_", torch.ones(40, 12), torch.ones(40, 12)
    mask = torch.zeros(40, 12, dtype=torch.bool)
    factor = torch.ones(12, 12).triu()
    factor[2, 7] = value
    for pattern in ((0, 0), (2, 4)):
        refused(
            lambda p=pattern: ops.obs_block_(weight, error, mask, factor, *p), op, "factor", f"{value} at index [2, 7]"
        )
    broken = weight.clone()
    broken[17, 5] = broken[39, 0] = value
    refused(lambda: ops.obs_block_(broken, error, mask, factor), op, "weight", f"{value} at index [17, 5]")
    assert (weight == 1).all()
    assert (error == 1).all()
    assert not mask.any()


def test_a_recursion_of_the_wrong_kind():
    op = "obs_block_"
    good = {
        "weight": torch.ones(4, 12),
        "error": torch.ones(4, 12),
        "mask": torch.zeros(4, 12, dtype=torch.bool),
        "factor": torch.eye(12),
    }

    def call(*numbers, **changed):
        return lambda: ops.obs_block_(**{**good, **changed}, **dict(zip(("keep_n", "group_m"), numbers, strict=False)))

    refused(call(weight=torch.ones(12)), op, "weight", "2 dimensions")
    for name in ("weight", "error"):
        refused(call(**{name: torch.ones(4, 12).half()}), op, name, "Float", "got Half")
        refused(call(**{name: torch.ones(12, 4).t()}), op, name, "contiguous columns")
        refused(call(**{name: torch.ones(12).expand(4, 12)}), op, name, "do not overlap")
    refused(call(error=torch.ones(4, 11)), op, "error", "shape [4, 12]", "got [4, 11]")
    refused(call(mask=torch.ones(4, 12)), op, "mask", "Bool", "got Float")
    refused(call(factor=torch.eye(11)), op, "factor", "shape [12, 12]", "got [11, 11]")
    refused(call(factor=torch.eye(12, device="meta")), op, "factor", "on cpu", "got meta")
    for value in (0.0, -1.0):
        factor = torch.eye(12)
        factor[3, 3] = value
        refused(call(factor=factor), op, "factor", "positive diagonal", f"got {value:g} at index [3, 3]")
    refused(call(2, 8), op, "group_m", "divide the 12 columns")
    refused(call(5, 4), op, "keep_n", "from 0 to 4")
    refused(call(1), op, "group_m", "from 1 to 32", "got 0")
    assert (good["weight"] == 1).all()


@pytest.mark.parametrize("value", BAD)
def test_a_quantization_of_what_is_not_finite(value):
    op, width = "quantize_block_", 12
    good = {
        "weight": torch.ones(40, width),
        "error": torch.ones(40, width),
        "mask": torch.ones(40, width, dtype=torch.bool),
        "scale": torch.ones(40),
        "factor": torch.ones(width, width).triu(),
        "current": torch.ones(40, width),
    }
    for name in ("weight", "factor", "current"):
        broken = good[name].clone()
        broken[2, 7] = value
        refused(
            lambda n=name, b=broken: ops.quantize_block_(**{**good, n: b}, bits=4), op, name, f"{value} at index [2, 7]"
        )
    scale = torch.ones(40).half()
    scale[5] = value
    refused(lambda: ops.quantize_block_(**{**good, "scale": scale}, bits=4), op, "scale", f"{value} at index [5]")
    assert (good["weight"] == 1).all()
    assert (good["error"] == 1).all()


def test_a_quantization_of_the_wrong_kind():
    op = "quantize_block_"
    good = {
        "weight": torch.ones(4, 12),
        "error": torch.ones(4, 12),
        "mask": torch.zeros(4, 12, dtype=torch.bool),
        "scale": torch.ones(4).bfloat16(),
        "factor": torch.eye(12),
        "bits": 4,
    }

    def call(**changed):
        return lambda: ops.quantize_block_(**{**good, **changed})

    refused(call(weight=torch.ones(12)), op, "weight", "2 dimensions")
    for name in ("weight", "error", "current"):
        refused(call(**{name: torch.ones(4, 12).half()}), op, name, "Float", "got Half")
        refused(call(**{name: torch.ones(12, 4).t()}), op, name, "contiguous columns")
        refused(call(**{name: torch.ones(12).expand(4, 12)}), op, name, "do not overlap")
    refused(call(error=torch.ones(4, 11)), op, "error", "shape [4, 12]", "got [4, 11]")
    refused(call(mask=torch.ones(4, 12)), op, "mask", "Bool", "got Float")
    refused(call(scale=torch.ones(4).double()), op, "scale", "float32, float16 or bfloat16", "got Double")
    refused(call(scale=torch.ones(3)), op, "scale", "shape [4]", "got [3]")
    refused(call(scale=torch.ones(8)[::2]), op, "scale", "contiguous")
    refused(call(scale=torch.tensor([1.0, 0.0, -1.0, 1.0])), op, "scale", "0 or more", "got -1 at index [2]")
    refused(call(factor=torch.eye(11)), op, "factor", "shape [12, 12]", "got [11, 11]")
    refused(call(factor=torch.eye(12, device="meta")), op, "factor", "on cpu", "got meta")
    for value in (0.0, -1.0):
        factor = torch.eye(12)
        factor[3, 3] = value
        refused(call(factor=factor), op, "factor", "positive diagonal", f"got {value:g} at index [3, 3]")
    for bits in (1, 9, -1):
        refused(call(bits=bits), op, "bits", "from 2 to 8", f"got {bits}")
    refused(call(error=good["weight"]), op, "weight", "not share memory with error")
    refused(call(current=good["weight"]), op, "weight", "not share memory with current")
    assert (good["weight"] == 1).all()


# Expanded tensors, whose rows share memory


def test_rows_of_an_expanded_tensor_are_not_written_and_read_at_once():
    memory = torch.arange(16) + 1.0
    rows = memory.expand(3, 16)  # of one memory
    first, second = rows[:1, :12], rows[1:2, 4:]
    mask = torch.ones(1, 12, dtype=torch.bool)
    vector = torch.ones(1).expand(3)

    def shared(call, op, written, other):
        refused(call, op, written, f"not share memory with {other}", "clone")

    shared(lambda: ops.obs_block_(first, second, mask, torch.eye(12)), "obs_block_", "weight", "error")
    shared(lambda: ops.obs_block_(first, rows[1:2, :12], mask, torch.eye(12)), "obs_block_", "weight", "error")
    shared(lambda: ops.prune_nm_(first, "score", 2, 4, moment=second), "prune_nm_", "weight", "moment")
    shared(lambda: ops.prune_topk_(first, "score", 2, moment=second), "prune_topk_", "weight", "moment")
    shared(lambda: prune_at_(first, "score", 0, 0, moment=second), "prune_at_", "weight", "moment")
    shared(lambda: ops.prune_topk_(first, "scaled", 2, column=second[0]), "prune_topk_", "weight", "column")
    token = torch.ones(1, 1)
    shared(lambda: ops.update_cosine_moment_(first, second, token), "update_cosine_moment_", "moment", "x")
    square = memory[:9].view(3, 3)
    shared(lambda: ops.update_gram_(square, square), "update_gram_", "gram", "x")
    state = torch.zeros(()), first[0], torch.zeros(12)
    shared(lambda: ops.update_moments_(*state, second), "update_moments_", "mean", "x")
    state = vector[0], vector[1:2], torch.zeros(1)
    shared(lambda: ops.update_moments_(*state, torch.ones(4, 1)), "update_moments_", "weight_sum", "mean")
    shared(lambda: ops.restore_mean_(first, mask, second[0], torch.ones(12)), "restore_mean_", "weight", "mean")
    shared(
        lambda: ops.admm_change_(first, second, mask, torch.ones(1, 12), torch.ones(12)),
        "admm_change_",
        "change",
        "weight",
    )
    shared(
        lambda: ops.admm_update_(first, second, mask, torch.ones(1, 12), torch.ones(12), 0.4),
        "admm_update_",
        "weight",
        "product",
    )
    assert torch.equal(memory, torch.arange(16) + 1.0)


def test_one_row_of_an_expanded_tensor_can_be_written():
    memory = torch.arange(12) + 1.0
    ops.prune_topk_(memory.expand(3, 12)[:1], "magnitude", 3)
    assert torch.equal(memory, torch.tensor([0.0] * 9 + [10.0, 11.0, 12.0]))


@pytest.mark.parametrize("op", SCORED)
def test_expanded_weights_are_refused_in_words(op):
    shared = torch.ones(12).expand(3, 12)
    refused(
        lambda: SCORED[op](shared, "magnitude"), op, "weight", "got strides [0, 1]", "expanded: its rows share memory"
    )
    refused(
        lambda: SCORED[op](torch.ones(3, 12), "scaled", column=torch.ones(1).expand(12)),
        op,
        "column",
        "expanded: its elements share memory",
        "call .contiguous() or .clone()",
    )


def test_other_expanded_tensors_are_refused_in_words():
    shared = torch.ones(12).expand(3, 12)
    words = "expanded: its rows share memory; call .contiguous() or .clone()"
    mask, good, vector = torch.ones(3, 12, dtype=torch.bool), torch.ones(3, 12), torch.ones(12)
    masks = mask[:1].expand(3, 12)
    calls = {
        "obs_block_ weight": lambda: ops.obs_block_(shared, good, mask, torch.eye(12)),
        "obs_block_ error": lambda: ops.obs_block_(good, shared, mask, torch.eye(12)),
        "obs_block_ mask": lambda: ops.obs_block_(good, good.clone(), masks, torch.eye(12)),
        "refine_swaps_ mask": lambda: ops.refine_swaps_(masks, good, torch.eye(12)),
        "balance_mean_ mask": lambda: ops.balance_mean_(masks, good, vector, vector),
        "restore_mean_ weight": lambda: ops.restore_mean_(shared, mask, vector, vector),
        "admm_change_ change": lambda: ops.admm_change_(shared, good, mask, good, vector),
        "admm_update_ weight": lambda: ops.admm_update_(shared, good, mask, good, vector, 0.4),
        "update_cosine_moment_ moment": lambda: ops.update_cosine_moment_(shared, torch.ones(2, 12), torch.ones(2, 3)),
        "update_moments_ x": lambda: ops.update_moments_(torch.zeros(()), vector, vector.clone(), shared),
    }
    for name, call in calls.items():
        refused(call, *name.split(), words)
