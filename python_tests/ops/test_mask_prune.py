"""Masks and pruning have the bits of the reference: order, ties, exact count. Contracts: csrc/ops/prune.h, mask.h."""

import math

import pytest
import torch
from helpers import (
    DTYPES,
    FORMULAS,
    SHAPES,
    assert_only_slice_changed,
    assert_same_bits,
    bits,
    embed,
    formula_arguments,
    make_weight,
    places,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_ext import ops
from ace_ext.ops import reference

GROUPS = ("row", "matrix")


def float32_score(weight, formula, arguments):
    return reference.score(weight, formula, **arguments, dtype=torch.float32)


def sizes_of(weight, group):
    return places(weight.shape[1] if group == "row" else weight.numel())


def assert_topk(weight, formula, arguments, keep_k, group):
    """Masks and prunes a copy inside a larger matrix; compares mask, copy, threshold and the surrounding entries."""
    score = float32_score(weight, formula, arguments)
    outer, view = embed(weight)
    expected = reference.keep_mask(score, keep_k, group)
    assert_mask(ops.topk_mask(view, formula, keep_k, **arguments, group=group), expected, view, weight)
    threshold = ops.prune_topk_(view, formula, keep_k, **arguments, group=group)
    assert_same_bits(view, reference.prune(weight, expected))
    assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
    assert_only_slice_changed(outer, view)


def assert_nm(weight, formula, arguments, keep_n, group_m):
    """The same for an N:M pattern."""
    outer, view = embed(weight)
    expected = reference.keep_mask_nm(float32_score(weight, formula, arguments), keep_n, group_m)
    assert_mask(ops.nm_mask(view, formula, keep_n, group_m, **arguments), expected, view, weight)
    ops.prune_nm_(view, formula, keep_n, group_m, **arguments)
    assert_same_bits(view, reference.prune(weight, expected))
    assert_only_slice_changed(outer, view)


def assert_mask(mask, expected, view, weight):
    """``view``, for which a mask was made, must still equal ``weight``."""
    assert (mask.dtype, mask.device, mask.is_contiguous()) == (torch.bool, view.device, True)
    assert torch.equal(mask.cpu(), expected)
    assert_same_bits(view, weight)


# prune_topk_


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk_matches_the_oracle(formula, group, dtype, ties, device, random):
    for rows, cols in SHAPES:
        weight = make_weight(rows, cols, dtype, random, ties).to(device)
        arguments = formula_arguments(formula, weight, random, ties)
        for keep_k in sizes_of(weight, group):
            assert_topk(weight, formula, arguments, keep_k, group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kept", [0.0, 0.25, 0.5, 0.9])
def test_topk_keeps_exactly_k_of_equal_scores(group, kept, dtype, device):
    weight = torch.full((33, 129), -0.5, dtype=dtype, device=device)
    keep_k = int(kept * (129 if group == "row" else weight.numel()))
    ops.prune_topk_(weight, "magnitude", keep_k, group=group)
    rows = weight if group == "row" else weight.reshape(1, -1)
    assert ((rows != 0).sum(1) == keep_k).all()
    assert (rows[:, :keep_k] == -0.5).all()  # the first columns, in row-major order
    assert not torch.signbit(rows[:, keep_k:]).any()


@pytest.mark.parametrize("group", GROUPS)
def test_topk_of_a_matrix_large_enough_for_threads(group, dtype, device, random):
    weight = make_weight(300, 1134, dtype, random, ties=True).to(device)
    arguments = formula_arguments("ria", weight, random)
    assert_topk(weight, "ria", arguments, (1134 if group == "row" else weight.numel()) // 2, group)


@pytest.mark.parametrize("formula", ["magnitude", "scaled", "cosp"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk_of_rows_whose_scales_jump(formula, ties, dtype, device, random):
    # The hints from one row must not change the next row's result.
    scale = torch.tensor([1.0, 1.1, 0.9, 0.0, 1.0, 60.0, 1e-3, 1.0, 1.0, 2.0, 0.5, 1.0])
    for cols in (33, 1134, 3000):
        weight = (make_weight(12, cols, torch.float32, random, ties) * scale[:, None]).to(dtype).to(device)
        arguments = formula_arguments(formula, weight, random, ties)
        for keep_k in places(cols):
            assert_topk(weight, formula, arguments, keep_k, "row")


@pytest.mark.parametrize("formula", ["magnitude", "scaled", "cosp"])
@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.9, 0.9999])
def test_topk_of_a_matrix_large_enough_for_a_sample(formula, share, dtype, device, random):
    weight = make_weight(150, 1134, dtype, random).to(device)
    weight[:40] *= 3.0  # rows differ in scale
    assert_topk(weight, formula, formula_arguments(formula, weight, random), int(share * weight.numel()), "matrix")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_topk_of_a_large_matrix_with_many_zeros(share, zeros, dtype, device, random):
    weight = make_weight(150, 1134, dtype, random)
    weight[torch.rand(150, 1134, generator=random) < zeros] = 0.0
    weight = weight.to(device)
    for group in GROUPS:
        size = weight.shape[1] if group == "row" else weight.numel()
        assert_topk(weight, "scaled", formula_arguments("scaled", weight, random), int(share * size), group)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_factors_whose_bound_overflows_but_whose_scores_do_not(sign, device, random):
    # The largest weight has a small factor, and the largest factor a small weight.
    weight, column = make_weight(20, 64, torch.float32, random), torch.full((64,), 1e-3)
    weight[:, 7] = 3e38
    column[9] = sign * 1e6
    weight, column = weight.to(device), column.to(device)
    for group in GROUPS:
        assert_topk(weight, "scaled", {"column": column}, 32, group)
    mask = reference.keep_mask_nm(float32_score(weight, "scaled", {"column": column}), 2, 4)
    expected = reference.prune(weight, mask)
    ops.prune_nm_(weight, "scaled", 2, 4, column=column)
    assert_same_bits(weight, expected)


@pytest.mark.parametrize("group", GROUPS)
def test_zeros_of_both_signs_are_one_score(group, dtype, device):
    weight = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], dtype=dtype, device=device)
    assert ops.prune_topk_(weight, "magnitude", 2, group=group).tolist() == [0.0]
    assert torch.signbit(weight).tolist() == [[True, False, False, False]]  # a kept weight keeps its bits


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_kept_has_no_threshold(group, dtype, device):
    weight = torch.full((3, 4), -1.0, dtype=dtype, device=device)
    threshold = ops.prune_topk_(weight, "magnitude", 0, group=group)
    assert threshold.tolist() == [math.inf] * (3 if group == "row" else 1)
    assert (bits(weight) == 0).all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_topk_of_nothing(group, shape, device, random):
    for formula in FORMULAS:
        weight = torch.zeros(shape, device=device)
        threshold = ops.prune_topk_(weight, formula, 0, **formula_arguments(formula, weight, random), group=group)
        assert threshold.tolist() == [math.inf] * (shape[0] if group == "row" else 1)


# prune_nm_


@pytest.mark.parametrize("group_m", [1, 2, 4, 5, 7, 8, 16, 32])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_nm_matches_the_oracle(group_m, dtype, ties, device, random):
    for groups in (1, 3, 37):
        weight = make_weight(5, group_m * groups, dtype, random, ties).to(device)
        arguments = formula_arguments("ria", weight, random)
        for keep_n in range(group_m + 1):
            assert_nm(weight, "ria", arguments, keep_n, group_m)


@pytest.mark.parametrize("formula", FORMULAS)
def test_nm_of_every_metric(formula, dtype, device, random):
    for ties in (False, True):
        weight = make_weight(33, 132, dtype, random, ties).to(device)
        arguments = formula_arguments(formula, weight, random, ties)
        assert_nm(weight, formula, arguments, 2, 4)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nm_of_nothing(shape, device):
    weight = torch.zeros(shape, device=device)
    ops.prune_nm_(weight, "magnitude", 2, 4)
    ops.prune_nm_(weight, "score", 2, 4, moment=weight.clone())
    assert weight.shape == shape
    assert ops.nm_mask(weight, "magnitude", 2, 4).shape == shape
    for group in GROUPS:
        assert ops.topk_mask(weight, "magnitude", 0, group=group).shape == shape


# The caller's own scores


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_by_score_matches_the_oracle(score_dtype, group, dtype, device, random):
    for rows, cols in SHAPES:
        weight = make_weight(rows, cols, dtype, random).to(device)
        score = torch.randn(rows, cols, generator=random).to(score_dtype).to(device)  # half of them negative
        for keep_k in sizes_of(weight, group):
            assert_topk(weight, "score", {"moment": score.float()}, keep_k, group)
            outer, view = embed(weight)
            threshold = ops.prune_topk_(view, "score", keep_k, moment=score.float(), group=group)
            assert_same_bits(view, reference.prune(weight, reference.keep_mask(score, keep_k, group)))
            assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
            assert_only_slice_changed(outer, view)


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("group_m", [2, 4, 5, 7, 8, 16, 32])
def test_nm_by_score_matches_the_oracle(score_dtype, group_m, dtype, device, random):
    weight = make_weight(7, group_m * 9, dtype, random).to(device)
    score = torch.randn(7, group_m * 9, generator=random).to(score_dtype).to(device)
    for keep_n in places(group_m):
        assert_nm(weight, "score", {"moment": score.float()}, keep_n, group_m)
        outer, view = embed(weight)
        ops.prune_nm_(view, "score", keep_n, group_m, moment=score.float())
        assert_same_bits(view, reference.prune(weight, reference.keep_mask_nm(score, keep_n, group_m)))
        assert_only_slice_changed(outer, view)


@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_may_be_its_own_score(group, device, random):
    weight = torch.randn(40, 33, generator=random).to(device)
    expected = reference.prune(weight, reference.keep_mask(weight, 17, group))
    mask = ops.topk_mask(weight, "score", 17, moment=weight, group=group)
    ops.prune_topk_(weight, "score", 17, moment=weight, group=group)
    assert torch.equal(mask.cpu(), expected != 0)
    assert_same_bits(weight, expected)


# Any floats at all

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, -1.0, 1.0, 3.4028235e38, -3.4028235e38]
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([float(v) for v in SPECIAL])
)


@st.composite
def selections(draw):
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    # Few distinct values make ties that the cut must split.
    values = draw(st.lists(FLOATS, min_size=1, max_size=draw(st.sampled_from([2, 5, 280]))))
    picks = draw(st.lists(st.integers(0, len(values) - 1), min_size=rows * cols, max_size=rows * cols))
    score = torch.tensor([values[i] for i in picks], dtype=torch.float32).reshape(rows, cols)
    group = draw(st.sampled_from(GROUPS))
    return score, group, draw(st.integers(0, cols if group == "row" else rows * cols))


@settings(max_examples=300, deadline=None)
@given(selections())
def test_selection_of_arbitrary_floats(selection):
    score, group, keep_k = selection
    mask = reference.keep_mask(score, keep_k, group)
    weight = torch.full_like(score, -1.0)
    assert torch.equal(ops.topk_mask(weight, "score", keep_k, moment=score, group=group), mask)
    threshold = ops.prune_topk_(weight, "score", keep_k, moment=score, group=group)
    assert torch.equal(weight != 0, mask)
    kept = (weight != 0).sum(1) if group == "row" else (weight != 0).sum().reshape(1)
    assert (kept == keep_k).all()
    assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
    again = weight.clone()
    assert_same_bits(ops.prune_topk_(again, "score", keep_k, moment=score, group=group), threshold)
    assert_same_bits(again, weight)


@settings(max_examples=200, deadline=None)
@given(selections())
def test_pruning_by_magnitude_is_idempotent(selection):
    weight, group, keep_k = selection
    expected = reference.prune(weight, reference.keep_mask(weight.abs(), keep_k, group))
    ops.prune_topk_(weight, "magnitude", keep_k, group=group)
    assert_same_bits(weight, expected)
    ops.prune_topk_(weight, "magnitude", keep_k, group=group)
    assert_same_bits(weight, expected)
