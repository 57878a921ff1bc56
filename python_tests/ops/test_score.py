"""Scores have the bits of the reference's float32 products. Contracts: csrc/ops.h."""

import math

import pytest
import torch
from helpers import (
    FORMULAS,
    SCORE_ROUNDINGS,
    SHAPES,
    UNIT,
    assert_same_bits,
    embed,
    formula_arguments,
    make_weight,
)

from ace_ext import ops
from ace_ext.ops import FORMULAS as FORMULAS_OF_OPS
from ace_ext.ops import reference


@pytest.mark.parametrize("formula", FORMULAS)
def test_scores_have_the_bits_of_the_float32_oracle(formula, dtype, device, random):
    for rows, cols in SHAPES:
        weight = make_weight(rows, cols, dtype, random).to(device)
        arguments = formula_arguments(formula, weight, random)
        score = ops.score(weight, formula, **arguments)
        assert_same_bits(score, reference.score(weight, formula, **arguments, dtype=torch.float32))
        exact = reference.score(weight, formula, **arguments)
        torch.testing.assert_close(score.cpu().double(), exact, rtol=SCORE_ROUNDINGS * UNIT, atol=0)
        assert_same_bits(ops.score(embed(weight)[1], formula, **arguments), score)


@pytest.mark.parametrize("formula", FORMULAS)
def test_scores_of_extreme_weights_have_the_oracles_bits(formula, device):
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -3e-39, 1.0, -1.0, 1e-20, -1e10, 2.0**60, 0.1]
    weight = torch.tensor([values, values[::-1], [0.0] * 12], device=device)
    arguments = formula_arguments(formula, weight, torch.Generator().manual_seed(1))
    score = ops.score(weight, formula, **arguments)
    assert_same_bits(score, reference.score(weight, formula, **arguments, dtype=torch.float32))
    assert not torch.signbit(score).any()


def test_own_score_is_handed_through(dtype, device, random):
    weight = make_weight(5, 7, dtype, random).to(device)
    own = torch.randn(5, 7, generator=random).to(device)
    own[0, 0], own[0, 1] = -0.0, -math.pi
    assert_same_bits(ops.score(weight, "score", moment=own), own)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_scores_of_nothing(formula, shape, device, random):
    weight = torch.zeros(shape, device=device)
    assert ops.score(weight, formula, **formula_arguments(formula, weight, random)).shape == shape


def test_ria_sums_do_not_lose_small_weights(device):
    # A float32 running sum would stop at 2^24, and the first weight's share of its row would be 1.
    weight = torch.ones(1, 4097, device=device)
    weight[0, 0] = 2.0**24
    column = torch.ones(4097, device=device)
    score = ops.score(weight, "ria", column=column)
    assert score[0, 0].item() < 2
    assert_same_bits(score, reference.score(weight, "ria", column, dtype=torch.float32))


def test_formulas_of_the_package_are_those_of_the_kernels():
    with pytest.raises(ValueError, match=f"formula must be one of {', '.join(FORMULAS_OF_OPS)} "):
        ops.score(torch.ones(1, 1), "none of them")
