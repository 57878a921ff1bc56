"""refine_swaps_ and obs_block_ against the float64 reference and their definitions. Contracts: csrc/ops.h."""

import pytest
import torch
from helpers import assert_only_slice_changed, assert_same_bits, check_column_slices, embed, make_weight, obs_bounds
from hypothesis import given, settings
from hypothesis import strategies as st

from ace_ext import ops
from ace_ext.ops import reference

PATTERNS = ((0, 0), (1, 2), (2, 4), (3, 8), (2, 6))


def make_gram(cols, random, tokens=None):
    """Of inputs that are correlated and differ in scale, as a layer's do."""
    x = torch.randn(tokens or 2 * cols, cols, generator=random) @ torch.randn(cols, cols, generator=random)
    x *= torch.rand(cols, generator=random) + 0.1
    return (x.double().T @ x.double()).float()


def make_mask(weight, keep_n, group_m):
    size = weight.float().abs()
    return reference.keep_mask_nm(size, keep_n, group_m) if group_m else reference.keep_mask(size, size.shape[1] // 2)


def kept(mask, group_m):
    """How many of each row, or of each group, are kept."""
    return mask.reshape(-1, group_m or max(mask.shape[1], 1)).sum(1)


# refine_swaps_


@pytest.mark.parametrize(("keep_n", "group_m"), PATTERNS)
def test_swaps_match_the_oracle(keep_n, group_m, dtype, device, random):
    for rows, groups in ((1, 1), (3, 2), (17, 6)):
        weight = make_weight(rows, groups * (group_m or 4), dtype, random)
        gram, mask = make_gram(weight.shape[1], random), make_mask(weight, keep_n, group_m)
        expected, expected_swaps = reference.refine_swaps(mask, weight, gram, keep_n, group_m)
        refined = mask.clone().to(device)
        swaps = ops.refine_swaps_(refined, weight.to(device), gram.to(device), keep_n, group_m)
        assert torch.equal(refined.cpu(), expected)
        assert torch.equal(swaps.cpu(), expected_swaps)


def test_swaps_lower_the_loss_of_most_rows(device, random):
    weight, gram = make_weight(64, 96, torch.float32, random), make_gram(96, random)
    for keep_n, group_m in PATTERNS:
        mask = make_mask(weight, keep_n, group_m)
        refined = mask.clone().to(device)
        swaps = ops.refine_swaps_(refined, weight.to(device), gram.to(device), keep_n, group_m).cpu()
        before, after = (reference.swap_loss(m, weight, gram) for m in (mask, refined))
        assert ((after < before) == (swaps > 0)).all()
        assert torch.equal(after[swaps == 0], before[swaps == 0])
        assert after.sum() < 0.95 * before.sum()
        assert torch.equal(kept(refined.cpu(), group_m), kept(mask, group_m))


@pytest.mark.parametrize(("keep_n", "group_m"), PATTERNS[:3])
def test_every_swap_lowers_the_loss(keep_n, group_m, dtype, random):
    weight, gram = make_weight(9, 48, dtype, random), make_gram(48, random)
    start = make_mask(weight, keep_n, group_m)
    all_swaps = ops.refine_swaps_(start.clone(), weight, gram, keep_n, group_m, 10_000)
    assert all_swaps.max() > 3
    # The float64 rounding of the loss that this test computes: 2 * 48 additions and products of at most row_norm^2.
    row_norm = (weight.double().abs() * gram.diagonal().double().sqrt()).sum(1)
    rounding = 2 * 48 * 2.0**-53 * row_norm**2
    before, loss = start, reference.swap_loss(start, weight, gram)
    for number in range(1, int(all_swaps.max()) + 1):
        mask = start.clone()
        assert torch.equal(ops.refine_swaps_(mask, weight, gram, keep_n, group_m, number), all_swaps.clamp(max=number))
        swapped = all_swaps >= number
        assert torch.equal((mask != before).sum(1), 2 * swapped)  # one more restored, one more removed
        after = reference.swap_loss(mask, weight, gram)
        assert (after < loss + rounding).all()
        before, loss = mask, after


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_swaps_of_whole_numbers(data):
    """Sums of small integers are exact, so ties are exact and each swap strictly lowers the loss."""
    keep_n, group_m = data.draw(st.sampled_from(PATTERNS))
    cols = data.draw(st.integers(1, 4)) * (group_m or 5)
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    limit = data.draw(st.integers(1, 3))
    weight = torch.randint(-limit, limit + 1, (3, cols), generator=random).float()
    x = torch.randint(-limit, limit + 1, (data.draw(st.integers(0, 9)), cols), generator=random).float()
    mask = make_mask(torch.rand(3, cols, generator=random), keep_n, group_m)
    gram, refined = x.T @ x, mask.clone()
    swaps = ops.refine_swaps_(refined, weight, gram, keep_n, group_m)
    expected, expected_swaps = reference.refine_swaps(mask, weight, gram, keep_n, group_m)
    assert torch.equal(refined, expected)
    assert torch.equal(swaps, expected_swaps)
    before, after = (reference.swap_loss(m, weight, gram) for m in (mask, refined))
    assert (after <= before - swaps).all()  # whole numbers: each swap gains at least 1
    assert torch.equal(kept(refined, group_m), kept(mask, group_m))


def test_swaps_with_nothing_to_choose_from(device, random):
    weight, gram = make_weight(3, 8, torch.float32, random).to(device), make_gram(8, random).to(device)
    for value in (True, False):
        mask = torch.full((3, 8), value, device=device)
        assert ops.refine_swaps_(mask, weight, gram).tolist() == [0, 0, 0]
        assert ops.refine_swaps_(mask, weight, gram, 4 * value, 4).tolist() == [0, 0, 0]
        assert (mask == value).all()
    mask = make_mask(weight.cpu(), 0, 0).to(device)
    assert ops.refine_swaps_(mask, weight, torch.zeros(8, 8, device=device)).tolist() == [0, 0, 0]  # nothing to gain
    assert ops.refine_swaps_(mask, weight, gram, max_swaps=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_swaps_of_nothing(shape, device):
    weight = torch.zeros(shape, device=device)
    gram = torch.zeros(shape[1], shape[1], device=device)
    assert ops.refine_swaps_(weight.bool(), weight, gram).tolist() == [0] * shape[0]


def test_swaps_in_column_slices(dtype, device, random):
    weight, gram = make_weight(7, 24, dtype, random), make_gram(24, random)
    mask = make_mask(weight, 2, 4)
    expected, _ = reference.refine_swaps(mask, weight, gram, 2, 4)
    there = gram.to(device)
    check_column_slices(lambda m, w: ops.refine_swaps_(m, w, there, 2, 4), weight, mask, expected, device)


@pytest.mark.parametrize("group_m", [0, 4])
def test_swaps_do_not_depend_on_threads_or_on_other_rows(group_m, threads, random):
    weight, gram = make_weight(50, 600, torch.bfloat16, random), make_gram(600, random)
    mask = make_mask(weight, group_m // 2, group_m)
    threads(1)
    alone = mask.clone()
    swaps = ops.refine_swaps_(alone, weight, gram, group_m // 2, group_m)
    for number in (2, 3):
        threads(number)
        shared = mask.clone()
        assert torch.equal(ops.refine_swaps_(shared, weight, gram, group_m // 2, group_m), swaps)
        assert torch.equal(shared, alone)
    for i in (0, 15, 16, 49):
        row = mask[i : i + 1].clone()
        ops.refine_swaps_(row, weight[i : i + 1], gram, group_m // 2, group_m)
        assert torch.equal(row[0], alone[i])


# obs_block_


def make_factor(width, random):
    """The upper Cholesky factor of an inverse Hessian, as SparseGPT makes it."""
    hessian = make_gram(width, random).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()


def run_obs(weight, mask, factor, keep_n=0, group_m=0, device="cpu"):
    solved, error, chosen = (
        weight.clone().to(device),
        torch.full_like(weight, 7.0, device=device),
        mask.clone().to(device),
    )
    ops.obs_block_(solved, error, chosen, factor.to(device), keep_n, group_m)
    return solved.cpu(), error.cpu(), chosen.cpu()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2), (33, 31), (5, 128), (7, 200)])
def test_obs_is_the_recursion(rows, width, device, random):
    weight, factor = make_weight(rows, width, torch.float32, random), make_factor(width, random)
    mask = torch.rand(rows, width, generator=random) < 0.5
    solved, error, same_mask = run_obs(weight, mask, factor, device=device)
    assert torch.equal(same_mask, mask)
    expected, expected_error, _ = reference.obs_block(weight, mask, factor, dtype=torch.float32)
    assert_same_bits(solved, expected)
    assert_same_bits(error, expected_error)
    exact, exact_error, _ = reference.obs_block(weight, mask, factor)
    bound, error_bound = obs_bounds(weight, mask, factor, exact_error)
    assert ((solved.double() - exact).abs() <= bound).all()
    assert ((error.double() - exact_error).abs() <= error_bound).all()
    assert (solved[~mask] == 0).all()
    assert not torch.signbit(solved[~mask]).any()
    assert (error[mask] == 0).all()


@pytest.mark.parametrize(("keep_n", "group_m"), [(0, 3), (1, 2), (2, 4), (4, 8), (5, 7), (16, 32), (4, 4)])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_obs_chooses_the_mask_of_a_pattern(keep_n, group_m, ties, device, random):
    width = 5 * group_m
    weight = make_weight(9, width, torch.float32, random, ties)
    factor = torch.eye(width) if ties else make_factor(width, random)
    given_mask = torch.rand(9, width, generator=random) < 0.5  # must not be read
    expected = reference.obs_block(weight, given_mask, factor, keep_n, group_m, dtype=torch.float32)
    for made, right in zip(run_obs(weight, given_mask, factor, keep_n, group_m, device), expected, strict=True):
        assert torch.equal(made, right)
    assert (kept(expected[2], group_m) == keep_n).all()


def test_obs_reads_nothing_below_the_diagonal(device, random):
    weight, factor = make_weight(4, 12, torch.float32, random), make_factor(12, random)
    below = torch.where(torch.ones(12, 12).tril(-1).bool(), torch.nan, factor)
    mask = torch.rand(4, 12, generator=random) < 0.5
    for made, right in zip(run_obs(weight, mask, below, device=device), run_obs(weight, mask, factor), strict=True):
        assert torch.equal(made, right)


def test_obs_of_the_first_half_is_least_squares(random):
    """With the first columns P removed, the rest K ends at ``w_K + H_KK^-1 H_KP w_P``, which minimises the loss."""
    hessian = make_gram(24, random).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight = make_weight(6, 24, torch.float32, random)
    mask = (torch.arange(24) >= 12).repeat(6, 1)
    best = weight[:, 12:] + weight[:, :12].double() @ torch.linalg.solve(hessian[12:, 12:], hessian[12:, :12]).T
    exact, exact_error, _ = reference.obs_block(weight, mask, factor)
    torch.testing.assert_close(exact[:, 12:], best, rtol=1e-6, atol=1e-8)
    solved, _, _ = run_obs(weight, mask, factor.float().contiguous())
    bound, _ = obs_bounds(weight, mask, factor, exact_error)
    # the factor's own rounding: as large as the recursion's, once more
    assert ((solved.double() - exact).abs() <= 2 * bound).all()


def test_obs_in_column_slices(device, random):
    weight, factor = make_weight(9, 16, torch.float32, random), make_factor(16, random)
    mask = torch.rand(9, 16, generator=random) < 0.5
    expected = run_obs(weight, mask, factor)
    (outer, view), (outer_error, error) = embed(weight.to(device)), embed(torch.zeros(9, 16, device=device))
    (_, wide_mask), (_, wide_factor) = embed(mask.to(device)), embed(factor.to(device))
    ops.obs_block_(view, error, wide_mask, wide_factor)
    for made, right in zip((view, error, wide_mask), expected, strict=True):
        assert torch.equal(made.cpu(), right)
    assert_only_slice_changed(outer, view)
    assert_only_slice_changed(outer_error, error)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_obs_of_nothing(shape, device):
    weight = torch.zeros(shape, device=device)
    ops.obs_block_(weight, weight.clone(), weight.bool(), torch.eye(shape[1], device=device))


def test_obs_does_not_depend_on_threads(threads, random):
    weight, factor = make_weight(900, 128, torch.float32, random), make_factor(128, random)
    mask = torch.rand(900, 128, generator=random) < 0.5
    threads(1)
    alone = run_obs(weight, mask, factor, 2, 4)
    for number in (2, 3):
        threads(number)
        for made, right in zip(run_obs(weight, mask, factor, 2, 4), alone, strict=True):
            assert torch.equal(made, right)
