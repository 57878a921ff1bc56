"""Pruning ops against the oracle's masks, bit for bit: the order, the ties, the exact count. Contracts: csrc/ops.h."""

import math

import pytest
import torch
from helpers import (
    DTYPES,
    METRICS,
    SHAPES,
    assert_only_slice_changed,
    assert_same_bits,
    bits,
    embed,
    make_weight,
    metric_arguments,
    places,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_ext import ops
from ace_ext.ops import reference

GROUPS = ("row", "matrix")


def float32_score(weight, metric, arguments):
    return reference.score(weight, metric, **arguments, dtype=torch.float32)


def sizes_of(weight, group):
    return places(weight.shape[1] if group == "row" else weight.numel())


def assert_topk(weight, metric, arguments, keep_k, group):
    """Prunes a copy inside a larger matrix and compares it, the threshold and the surroundings with the oracle."""
    score = float32_score(weight, metric, arguments)
    outer, view = embed(weight)
    threshold = ops.prune_topk_(view, metric, keep_k, **arguments, group=group)
    assert_same_bits(view, reference.prune(weight, reference.keep_mask(score, keep_k, group)))
    assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
    assert_only_slice_changed(outer, view)


# prune_topk_


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk_matches_the_oracle(metric, group, dtype, ties, device, random):
    for rows, cols in SHAPES:
        weight = make_weight(rows, cols, dtype, random, ties).to(device)
        arguments = metric_arguments(metric, weight, random, ties)
        for keep_k in sizes_of(weight, group):
            assert_topk(weight, metric, arguments, keep_k, group)


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
    arguments = metric_arguments("ria", weight, random)
    assert_topk(weight, "ria", arguments, (1134 if group == "row" else weight.numel()) // 2, group)


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "cosp"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk_of_rows_whose_scales_jump(metric, ties, dtype, device, random):
    # What a search learned from one row must not matter to the next.
    scale = torch.tensor([1.0, 1.1, 0.9, 0.0, 1.0, 60.0, 1e-3, 1.0, 1.0, 2.0, 0.5, 1.0])
    for cols in (33, 1134, 3000):
        weight = (make_weight(12, cols, torch.float32, random, ties) * scale[:, None]).to(dtype).to(device)
        arguments = metric_arguments(metric, weight, random, ties)
        for keep_k in places(cols):
            assert_topk(weight, metric, arguments, keep_k, "row")


@pytest.mark.parametrize("metric", ["magnitude", "wanda", "cosp"])
@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.9, 0.9999])
def test_topk_of_a_matrix_large_enough_for_a_sample(metric, share, dtype, device, random):
    weight = make_weight(150, 1134, dtype, random).to(device)
    weight[:40] *= 3.0  # rows differ in scale
    assert_topk(weight, metric, metric_arguments(metric, weight, random), int(share * weight.numel()), "matrix")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
def test_topk_of_a_large_matrix_with_many_zeros(share, zeros, dtype, device, random):
    weight = make_weight(150, 1134, dtype, random)
    weight[torch.rand(150, 1134, generator=random) < zeros] = 0.0
    weight = weight.to(device)
    for group in GROUPS:
        size = weight.shape[1] if group == "row" else weight.numel()
        assert_topk(weight, "wanda", metric_arguments("wanda", weight, random), int(share * size), group)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_factors_whose_bound_overflows_but_whose_scores_do_not(sign, device, random):
    # The largest weight meets a small factor and the largest factor a small weight.
    weight, column = make_weight(20, 64, torch.float32, random), torch.full((64,), 1e-3)
    weight[:, 7] = 3e38
    column[9] = sign * 1e6
    weight, column = weight.to(device), column.to(device)
    for group in GROUPS:
        assert_topk(weight, "wanda", {"column": column}, 32, group)
    mask = reference.keep_mask_nm(float32_score(weight, "wanda", {"column": column}), 2, 4)
    expected = reference.prune(weight, mask)
    ops.prune_nm_(weight, "wanda", 2, 4, column=column)
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
    for metric in METRICS:
        weight = torch.zeros(shape, device=device)
        threshold = ops.prune_topk_(weight, metric, 0, **metric_arguments(metric, weight, random), group=group)
        assert threshold.tolist() == [math.inf] * (shape[0] if group == "row" else 1)


# prune_nm_


@pytest.mark.parametrize("group_m", [1, 2, 4, 5, 7, 8, 16, 32])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_nm_matches_the_oracle(group_m, dtype, ties, device, random):
    for groups in (1, 3, 37):
        weight = make_weight(5, group_m * groups, dtype, random, ties).to(device)
        arguments = metric_arguments("ria", weight, random)
        score = float32_score(weight, "ria", arguments)
        for keep_n in range(group_m + 1):
            outer, view = embed(weight)
            ops.prune_nm_(view, "ria", keep_n, group_m, **arguments)
            assert_same_bits(view, reference.prune(weight, reference.keep_mask_nm(score, keep_n, group_m)))
            assert_only_slice_changed(outer, view)


@pytest.mark.parametrize("metric", METRICS)
def test_nm_of_every_metric(metric, dtype, device, random):
    for ties in (False, True):
        weight = make_weight(33, 132, dtype, random, ties).to(device)
        arguments = metric_arguments(metric, weight, random, ties)
        mask = reference.keep_mask_nm(float32_score(weight, metric, arguments), 2, 4)
        expected = reference.prune(weight, mask)
        ops.prune_nm_(weight, metric, 2, 4, **arguments)
        assert_same_bits(weight, expected)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nm_of_nothing(shape, device):
    weight = torch.zeros(shape, device=device)
    ops.prune_nm_(weight, "magnitude", 2, 4)
    ops.prune_nm_by_score_(weight, weight.clone(), 2, 4)
    assert weight.shape == shape


# The caller's own scores


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_by_score_matches_the_oracle(score_dtype, group, dtype, device, random):
    for rows, cols in SHAPES:
        weight = make_weight(rows, cols, dtype, random).to(device)
        score = torch.randn(rows, cols, generator=random).to(score_dtype).to(device)  # half of them negative
        for keep_k in sizes_of(weight, group):
            outer, view = embed(weight)
            threshold = ops.prune_by_score_(view, score, keep_k, group)
            assert_same_bits(view, reference.prune(weight, reference.keep_mask(score, keep_k, group)))
            assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
            assert_only_slice_changed(outer, view)


@pytest.mark.parametrize("score_dtype", DTYPES)
@pytest.mark.parametrize("group_m", [2, 4, 5, 7, 8, 16, 32])
def test_nm_by_score_matches_the_oracle(score_dtype, group_m, dtype, device, random):
    weight = make_weight(7, group_m * 9, dtype, random).to(device)
    score = torch.randn(7, group_m * 9, generator=random).to(score_dtype).to(device)
    for keep_n in places(group_m):
        outer, view = embed(weight)
        ops.prune_nm_by_score_(view, score, keep_n, group_m)
        assert_same_bits(view, reference.prune(weight, reference.keep_mask_nm(score, keep_n, group_m)))
        assert_only_slice_changed(outer, view)


@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_may_be_its_own_score(group, device, random):
    weight = torch.randn(40, 33, generator=random).to(device)
    expected = reference.prune(weight, reference.keep_mask(weight, 17, group))
    ops.prune_by_score_(weight, weight, 17, group)
    assert_same_bits(weight, expected)


def test_a_score_may_have_any_strides(device, random):
    weight, score = torch.ones(9, 12, device=device), torch.randn(12, 9, generator=random).to(device).t()
    mask = reference.keep_mask(score, 5)
    ops.prune_by_score_(weight, score, 5)
    assert torch.equal(weight.cpu() != 0, mask)


def test_by_score_is_the_metric_score(dtype, device, random):
    weight = make_weight(9, 16, dtype, random).to(device)
    score = torch.randn(9, 16, generator=random).to(device)
    twins = [weight.clone() for _ in range(4)]
    ops.prune_by_score_(twins[0], score, 5)
    ops.prune_topk_(twins[1], "score", 5, moment=score)
    ops.prune_nm_by_score_(twins[2], score, 1, 4)
    ops.prune_nm_(twins[3], "score", 1, 4, moment=score)
    assert_same_bits(twins[0], twins[1])
    assert_same_bits(twins[2], twins[3])


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
    threshold = ops.prune_by_score_(weight, score, keep_k, group)
    assert torch.equal(weight != 0, mask)
    kept = (weight != 0).sum(1) if group == "row" else (weight != 0).sum().reshape(1)
    assert (kept == keep_k).all()
    assert_same_bits(threshold, reference.threshold(score, keep_k, group).float())
    again = weight.clone()
    assert_same_bits(ops.prune_by_score_(again, score, keep_k, group), threshold)
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
