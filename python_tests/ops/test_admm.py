"""admm_change_ and admm_update_ against their formulas, bit for bit. Contract: csrc/ops/admm.h."""

import pytest
import torch
from helpers import admm_change, admm_update, assert_same_bits, embed

from ace_ext import ops
from ace_ext.pruning.stages.admm import torch_change_, torch_update_

SHAPES = ((1, 1), (3, 7), (5, 64), (4, 65), (300, 1134))
"""At, below and above the width of a vector, and large enough to be divided among threads."""


def arguments(shape, random):
    weight, dense = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    return weight, torch.rand(shape, generator=random) < 0.5, dense, torch.rand(shape[1], generator=random) + 0.1


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_change_is_its_formula(shape, products, random):
    weight, mask, dense, norm = arguments(shape, random)
    change = torch.full(shape, torch.nan, dtype=products)
    ops.admm_change_(change, weight, mask, dense, norm)
    assert_same_bits(change, admm_change(weight, mask, dense, norm).to(products))


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_is_its_formula(shape, products, random):
    weight, mask, dense, norm = arguments(shape, random)
    product = torch.randn(shape, generator=random).to(products)
    expected = admm_update(weight, product, mask, dense, norm, 0.4)
    ops.admm_update_(weight, product, mask, dense, norm, 0.4)
    assert_same_bits(weight, expected)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_column_slices_are_read_and_written(products, random):
    weight, mask, dense, norm = arguments((6, 33), random)
    expected, change = admm_change(weight, mask, dense, norm).to(products), torch.zeros(6, 33, dtype=products)
    slices = [embed(t)[1] for t in (change, weight, mask, dense)]
    ops.admm_change_(*slices, norm)
    assert_same_bits(slices[0].contiguous(), expected)
    expected = admm_update(weight, change, mask, dense, norm, 0.5)
    slices = [embed(t)[1] for t in (weight, change, mask, dense)]
    ops.admm_update_(*slices, norm, 0.5)
    assert_same_bits(slices[0].contiguous(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_goes_through(value, products, random):
    weight, mask, dense, norm = arguments((3, 40), random)
    weight[1, 5], mask[1, 5] = value, False
    change = torch.zeros(3, 40, dtype=products)
    ops.admm_change_(change, weight, mask, dense, norm)
    assert (~torch.isfinite(change)).nonzero().tolist() == [[1, 5]]
    ops.admm_update_(weight, torch.zeros_like(change), mask, dense, norm, 0.4)
    assert (~torch.isfinite(weight)).nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_is_done_to_nothing(shape):
    empty, norm = torch.empty(shape), torch.empty(shape[1])
    ops.admm_change_(empty.bfloat16(), empty, empty > 0, empty, norm)
    ops.admm_update_(empty, empty.bfloat16(), empty > 0, empty.clone(), norm, 1.0)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_the_operations_for_other_devices_do_the_same(products, random):
    weight, mask, dense, norm = arguments((30, 70), random)
    change, other = (torch.zeros(30, 70, dtype=products) for _ in range(2))
    ops.admm_change_(change, weight, mask, dense, norm)
    torch_change_(other, weight, mask, dense, norm)
    torch.testing.assert_close(other, change)  # torch may fuse a multiplication and an addition
    again = weight.clone()
    ops.admm_update_(weight, change, mask, dense, norm, 0.4)
    torch_update_(again, change, mask, dense, norm, 0.4)
    torch.testing.assert_close(again, weight)
