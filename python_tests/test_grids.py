"""Grids of quantized weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ace_ext import grids
from ace_ext.errors import InputError
from ace_ext.grids import Grid

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sample(grid: Grid, dtype: torch.dtype, rows: int, cols: int, seed: int) -> Tensor:
    """A matrix on the grid, half of it zeros, with scales of many magnitudes and both signs; row 0 is all zero."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(grid.lowest, grid.highest + 1, (rows, cols), generator=draw, dtype=torch.int8)
    codes *= torch.randint(0, 2, (rows, cols), generator=draw, dtype=torch.int8)
    codes[:1] = 0
    scales = torch.randn(rows, grid.groups(cols), generator=draw).exp().mul(0.01).to(dtype)
    scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=draw)
    return grid.dequantize(codes, scales)


@settings(deadline=None)
@given(
    st.sampled_from(grids.WIDTHS),
    st.sampled_from([64, 128, 192]),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 9), st.integers(0, 300)),
    st.integers(0, 2**31),
)
def test_recovers_every_matrix_on_a_grid(
    bits: int, group: int, dtype: torch.dtype, shape: tuple[int, int], seed: int
) -> None:
    grid = Grid(bits, group)
    weight = sample(grid, dtype, *shape, seed)
    found = grid.recover(weight)
    assert found is not None
    assert found.codes.dtype == torch.int8
    assert found.scales.dtype == dtype
    assert tuple(found.scales.shape) == (shape[0], grid.groups(shape[1]))
    assert torch.equal(grid.dequantize(*found), weight)
    assert not torch.signbit(grid.dequantize(*found)[weight == 0]).any()


@settings(deadline=None)
@given(
    st.sampled_from(grids.WIDTHS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 9), st.integers(0, 150)),
    st.integers(0, 2**31),
)
def test_nearest_code_against_trying_all(bits: int, dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    """In float64. A quotient is rounded once in float32, so two codes may be taken for as near whose distances from the
    weight differ by a few units of its last place."""
    grid = Grid(bits, 64)
    draw = torch.Generator().manual_seed(seed)
    scales = torch.randn(shape[0], grid.groups(shape[1]), generator=draw).exp().to(dtype)
    scales *= 1 - 2 * torch.randint(0, 2, scales.shape, generator=draw)
    scales[:1, :1] = 0
    weight = torch.randn(shape, generator=draw) * 2**bits
    codes = grid.nearest(weight, scales)
    assert codes.dtype == torch.int8
    assert not codes[:1, :64].any(), "the scale of this group is 0"
    steps = grid.widened(scales, shape[1]).double()
    every = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.float64)
    least = (weight.double()[..., None] - every * steps[..., None]).abs().amin(-1)
    found = (weight.double() - codes * steps).abs()
    assert bool((found <= least + 2**-22 * weight.abs()).all())


@settings(deadline=None)
@given(st.sampled_from(grids.WIDTHS), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_a_point_of_the_grid_is_its_own_nearest(bits: int, dtype: torch.dtype, seed: int) -> None:
    grid = Grid(bits, 64)
    found = grid.recover(sample(grid, dtype, 5, 150, seed))
    assert found is not None
    assert torch.equal(grid.nearest(grid.dequantize(*found), found.scales), found.codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", grids.WIDTHS)
def test_a_matrix_off_the_grid_is_not_recovered(bits: int, dtype: torch.dtype) -> None:
    grid = Grid(bits, 128)
    weight = sample(grid, dtype, 8, 300, seed=5)
    weight[3, 7] = weight[3, :128].abs().max() * 0.377
    assert grid.recover(weight) is None
    assert grid.recover(weight[:3]) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_on_no_grid(value: float) -> None:
    weight = sample(Grid(4, 64), torch.bfloat16, 4, 64, seed=1)
    weight[1, 5] = value
    assert Grid(4, 64).recover(weight) is None


def test_a_group_with_the_lowest_code_on_both_sides_is_on_no_grid() -> None:
    weight = torch.zeros(3, 64)
    weight[0, :2] = torch.tensor([-8.0, 7.0])
    weight[1, :2] = torch.tensor([8.0, -7.0])
    found = Grid(4, 64).recover(weight)
    assert found is not None
    assert found.codes[:2, :2].tolist() == [[-8, 7], [-8, 7]]
    assert found.scales[:, 0].tolist() == [1.0, -1.0, 0.0]
    weight[2, :3] = torch.tensor([8.0, -8.0, 1.0])
    assert Grid(4, 64).recover(weight) is None


def test_recovers_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(8, 64)
    weight = sample(grid, torch.bfloat16, 11, 130, seed=2)
    whole = grid.recover(weight)
    monkeypatch.setattr(grids, "AT_ONCE", 300)
    parts = grid.recover(weight)
    assert whole is not None
    assert parts is not None
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_recovers_a_transposed_view() -> None:
    weight = sample(Grid(4, 64), torch.bfloat16, 5, 128, seed=3)
    found, expected = (Grid(4, 64).recover(w) for w in (weight.T.contiguous().T, weight))
    assert found is not None
    assert expected is not None
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_product_is_rounded_once() -> None:
    codes = torch.tensor([[101]], dtype=torch.int8)
    scales = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    assert Grid(8, 64).dequantize(codes, scales).item() == torch.tensor(101 * 1.0078125).bfloat16().item()


@pytest.mark.parametrize(
    ("bits", "group", "said"),
    [
        (5, 128, r"bits must be one of 8, 4, 3 \(got 5\)"),
        (4, 100, r"group must be a multiple of 64 columns \(got 100\)"),
        (4, 0, r"got 0"),
    ],
)
def test_an_unsupported_grid_is_refused(bits: int, group: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Grid(bits, group)
