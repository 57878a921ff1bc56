"""balance_mean_ and restore_mean_ against references and definitions: csrc/ops/balance.h, csrc/ops/restore.h."""

import pytest
import torch
from helpers import assert_only_slice_changed, assert_same_bits, check_column_slices, embed, make_weight
from ops.test_errors import BAD, refused
from ops.test_swaps_obs import kept, make_mask

from ace_ext import ops
from ace_ext.ops import mean_reference

PATTERNS = ((0, 0), (1, 2), (2, 4), (4, 8), (3, 7), (16, 32))


def make_moments(cols, random, ties=False):
    """Variance and mean of input columns: of different scale, some constant; with ``ties`` all equal."""
    if ties:
        return torch.full((cols,), 0.5), torch.full((cols,), 0.25)
    variance = (torch.randn(cols, generator=random) * 2).exp()
    variance[::11] = 0.0
    return variance, torch.randn(cols, generator=random) * variance.sqrt() + 0.1


def balance(mask, weight, moments, *numbers, device="cpu"):
    """The balanced copy of ``mask`` and the swaps."""
    mask = mask.clone().to(device)
    swaps = ops.balance_mean_(mask, weight.to(device), *(t.to(device) for t in moments), *numbers)
    return mask.cpu(), swaps.cpu()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("keep_n", "group_m"), PATTERNS)
def test_balancing_matches_the_oracle(keep_n, group_m, ties, dtype, device, random):
    for rows, groups, rounds in ((1, 1, 1), (3, 2, 2), (5, 33, 3), (4, 47, 1)):
        weight = make_weight(rows, groups * (group_m or 4), dtype, random, ties)
        moments, mask = make_moments(weight.shape[1], random, ties), make_mask(weight, keep_n, group_m)
        expected = mean_reference.balance_mean(mask, weight, *moments, group_m, rounds)
        found = balance(mask, weight, moments, group_m, rounds, device=device)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("keep_n", "group_m"), PATTERNS)
def test_every_swap_lowers_the_loss(keep_n, group_m, dtype, device, random):
    weight = make_weight(64, 448 if group_m == 7 else 384, dtype, random)
    moments, mask = make_moments(weight.shape[1], random), make_mask(weight, keep_n, group_m)
    last = mask
    for rounds in (0, 1, 2, 8):
        found, swaps = balance(mask, weight, moments, group_m, rounds, device=device)
        assert torch.equal(kept(found, group_m), kept(mask, group_m))
        before, after = (mean_reference.mean_loss(m, weight, *moments) for m in (last, found))
        assert (after <= before).all()
        assert ((after < before) == (last != found).any(1)).all()
        assert (swaps <= 32 * rounds).all()
        assert ((swaps > 0) == (found != mask).any(1)).all()
        last = found


@pytest.mark.parametrize(("keep_n", "group_m", "share"), [(0, 0, 0.9), (2, 4, 0.85)])
def test_a_round_gains_nearly_what_a_hundred_greedy_swaps_gain(keep_n, group_m, share, random):
    """``refine_swaps_`` on the explicit ``diag(σ²) + m mᵀ``, which searches the whole row for each swap."""
    weight = make_weight(64, 576, torch.float32, random)
    variance = (torch.randn(576, generator=random)).exp()
    mean = torch.randn(576, generator=random) * variance.sqrt() * 0.5
    score = weight.abs() * (variance + mean.square()).sqrt()
    mask = ops.nm_mask(score, "magnitude", 2, 4) if group_m else ops.topk_mask(score, "magnitude", 288)
    greedy = mask.clone()
    ops.refine_swaps_(greedy, weight, variance.diag() + mean.outer(mean), keep_n, group_m, 100)

    def loss(mask):
        return mean_reference.mean_loss(mask, weight, variance, mean).sum()

    gains = [loss(mask) - loss(balance(mask, weight, (variance, mean), group_m, rounds)[0]) for rounds in (1, 2, 4)]
    best = loss(mask) - loss(greedy)
    assert best > 0.05 * loss(mask)
    assert gains[0] > share * best
    assert gains[1] > gains[0]
    assert gains[2] > 0.95 * best


def test_a_balanced_row_is_left_alone(device):
    mask, weight = torch.tensor([[True, True, False, False]]), torch.tensor([[3.0, -2.0, 1.0, -1.0]])
    moments = (torch.ones(4), torch.ones(4))  # the removed weights shift nothing and are the smallest
    assert balance(mask, weight, moments, 0, 5, device=device)[1].tolist() == [0]
    swapped, swaps = balance(~mask, weight, moments, 0, 5, device=device)
    assert swaps.tolist() == [2]
    assert torch.equal(swapped, mask)


@pytest.mark.parametrize("group_m", [0, 4])
def test_balancing_with_nothing_to_choose_from(group_m, device, random):
    weight, moments = make_weight(3, 8, torch.float32, random), make_moments(8, random)
    for value in (True, False):
        found, swaps = balance(torch.full((3, 8), value), weight, moments, group_m, 2, device=device)
        assert swaps.tolist() == [0, 0, 0]
        assert (found == value).all()
    mask = make_mask(weight, 2, 4)
    assert balance(mask, weight, (torch.zeros(8), torch.zeros(8)), group_m, device=device)[1].tolist() == [0, 0, 0]
    assert balance(mask, weight, moments, group_m, 0, device=device)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_balancing_nothing(shape, device):
    weight, moment = torch.zeros(shape, device=device), torch.zeros(shape[1], device=device)
    assert ops.balance_mean_(weight.bool(), weight, moment, moment).tolist() == [0] * shape[0]


@pytest.mark.parametrize("group_m", [0, 4])
def test_products_beyond_float32_are_left_alone(group_m, device):
    """They are finite in float64, which decides swaps, but the float32 search and bound overflow."""
    weight = torch.full((2, 64), 1e30)
    weight[1] = torch.linspace(-1, 1, 64)
    mask = make_mask(torch.ones(2, 64), 2, 4)
    moments = (torch.full((64,), 1e30), torch.full((64,), 1e30))
    found, swaps = balance(mask, weight, moments, group_m, 2, device=device)
    assert swaps[0] == 0
    assert torch.equal(found[0], mask[0])
    assert torch.equal(swaps, mean_reference.balance_mean(mask, weight, *moments, group_m, 2)[1])


def test_balancing_column_slices(dtype, device, random):
    weight, moments = make_weight(7, 24, dtype, random), make_moments(24, random)
    mask = make_mask(weight, 2, 4)
    expected, _ = mean_reference.balance_mean(mask, weight, *moments, 4)
    there = [moment.to(device) for moment in moments]
    check_column_slices(lambda m, w: ops.balance_mean_(m, w, *there, 4), weight, mask, expected, device)


@pytest.mark.parametrize("group_m", [0, 4])
def test_balancing_does_not_depend_on_threads(group_m, threads, random):
    weight, moments = make_weight(200, 1136, torch.bfloat16, random), make_moments(1136, random)
    mask = make_mask(weight, group_m // 2, group_m)
    threads(1)
    alone = balance(mask, weight, moments, group_m, 2)
    for number in (2, 3):
        threads(number)
        shared = balance(mask, weight, moments, group_m, 2)
        assert torch.equal(shared[0], alone[0])
        assert torch.equal(shared[1], alone[1])


# restore_mean_


def restore(weight, mask, mean, direction, device="cpu"):
    weight = weight.clone().to(device)
    ops.restore_mean_(weight, mask.to(device), mean.to(device), direction.to(device))
    return weight.cpu()


@pytest.mark.parametrize("ties", [False, True])
def test_restoring_matches_the_oracle(ties, device, random):
    for rows, cols in ((1, 1), (3, 8), (17, 31), (2, 33), (5, 1134)):
        weight = make_weight(rows, cols, torch.float32, random, ties)
        variance, mean = make_moments(cols, random, ties)
        direction, mask = mean / (variance + 0.01), make_mask(weight, 0, 0)
        restored = restore(weight, mask, mean, direction, device)
        assert_same_bits(restored, mean_reference.restore_mean(weight, mask, mean, direction))
        assert_same_bits(restored[~mask], torch.zeros(int((~mask).sum())))


def test_restoring_solves_the_normal_equations(device, random):
    """The change ``δ`` of the kept weights is the least-squares one for ``diag(σ²) + m mᵀ``, found by a dense solve."""
    weight, mask = make_weight(6, 40, torch.float32, random), torch.rand(6, 40, generator=random) < 0.5
    variance, mean = torch.rand(40, generator=random) + 0.1, torch.randn(40, generator=random)
    restored = restore(weight, mask, mean, mean / variance, device)
    gram = (variance.diag() + mean.outer(mean)).double()
    for i, row in enumerate(mask):
        target = gram[row][:, ~row] @ weight[i, ~row].double()
        change = torch.linalg.solve(gram[row][:, row], target)
        torch.testing.assert_close(restored[i, row].double(), weight[i, row] + change, rtol=1e-5, atol=1e-5)


def test_a_row_without_removed_or_kept_weights(device, random):
    weight, mean = make_weight(2, 8, torch.float32, random), torch.randn(8, generator=random)
    mask = torch.tensor([[True], [False]]).expand(2, 8).contiguous()
    restored = restore(weight, mask, mean, mean, device)
    assert torch.equal(restored[0], weight[0])
    assert_same_bits(restored[1], torch.zeros(8))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_restoring_nothing(shape, device):
    weight, vector = torch.zeros(shape, device=device), torch.zeros(shape[1], device=device)
    ops.restore_mean_(weight, weight.bool(), vector, vector)


def test_restoring_a_column_slice(device, random):
    weight, mean = make_weight(7, 24, torch.float32, random), torch.randn(24, generator=random)
    mask = make_mask(weight, 2, 4)
    outer, view = embed(weight.to(device))
    ops.restore_mean_(view, mask.to(device), mean.to(device), mean.to(device))
    assert_same_bits(view.cpu(), mean_reference.restore_mean(weight, mask, mean, mean))
    assert_only_slice_changed(outer, view)


def test_restoring_does_not_depend_on_threads(threads, random):
    weight, mean = make_weight(200, 1136, torch.float32, random), torch.randn(1136, generator=random)
    mask = make_mask(weight, 2, 4)
    threads(1)
    alone = restore(weight, mask, mean, mean)
    threads(3)
    assert_same_bits(restore(weight, mask, mean, mean), alone)


# Errors


@pytest.mark.parametrize("value", BAD)
def test_restoring_what_is_not_finite(value, random):
    op, weight = "restore_mean_", make_weight(40, 12, torch.float32, random)
    mask, mean, direction = torch.tensor([True, False]).repeat(40, 6), torch.ones(12), torch.ones(12)
    before = weight.clone()
    for argument, vector in (("mean", mean), ("direction", direction)):
        vector[7] = vector[9] = value
        refused(lambda: ops.restore_mean_(weight, mask, mean, direction), op, argument, f"got {value} at index [7]")
        vector[7] = vector[9] = 0.5
    assert_same_bits(weight, before)
    for column in (4, 5):
        bad = weight.clone()
        bad[17, column] = bad[39, 0] = value
        found = f"got {value} at index [17, {column}]"
        refused(lambda w=bad: ops.restore_mean_(w, mask, mean, direction), op, "weight", found)
        assert_same_bits(bad[:17], before[:17])


def test_restoring_the_wrong_kind():
    op, weight, vector = "restore_mean_", torch.ones(4, 12), torch.ones(12)
    mask = torch.tensor([True, False]).repeat(4, 6)

    def call(weight, mask, mean, direction):
        return lambda: ops.restore_mean_(weight, mask, mean, direction)

    refused(call(weight[0], mask, vector, vector), op, "weight", "2 dimensions")
    refused(call(weight.half(), mask, vector, vector), op, "weight", "Float", "got Half")
    refused(call(weight, mask[:3], vector, vector), op, "mask", "shape [4, 12]", "got [3, 12]")
    refused(call(weight, mask.float(), vector, vector), op, "mask", "Bool", "got Float")
    refused(call(weight, mask, vector[:11], vector), op, "mean", "shape [12]", "got [11]")
    refused(call(weight, mask, vector, vector.double()), op, "direction", "Float", "got Double")
    refused(call(weight, mask, vector, vector.to("meta")), op, "direction", "on cpu", "got meta")
    refused(call(weight, mask, vector, -vector), op, "direction", "sign of mean", "got -1 for 1 at index [0]")


@pytest.mark.parametrize("value", BAD)
def test_balancing_what_is_not_finite(value, dtype, random):
    op, weight = "balance_mean_", make_weight(40, 12, dtype, random)
    variance, mean = torch.ones(12), torch.zeros(12)
    start = torch.tensor([True, False]).repeat(40, 6)
    mask = start.clone()
    for argument, vector in (("variance", variance), ("mean", mean)):
        vector[7] = vector[9] = value
        refused(lambda: ops.balance_mean_(mask, weight, variance, mean), op, argument, f"got {value} at index [7]")
        vector[7] = vector[9] = 0.5
    mean.zero_()  # a product with it hides nothing
    for column in (4, 5):  # kept and removed
        bad = weight.clone()
        bad[17, column] = bad[39, 0] = value
        for group_m in (0, 4):
            found = f"got {value} at index [17, {column}]"
            refused(lambda w=bad, m=group_m: ops.balance_mean_(mask, w, variance, mean, m), op, "weight", found)
    assert torch.equal(mask, start)


def test_balancing_the_wrong_kind():
    op, weight, vector = "balance_mean_", torch.ones(4, 12), torch.ones(12)
    mask = torch.tensor([True, False]).repeat(4, 6)

    def call(mask, weight, variance, mean, *numbers):
        return lambda: ops.balance_mean_(mask, weight, variance, mean, *numbers)

    refused(call(mask, weight[0], vector, vector), op, "weight", "2 dimensions")
    refused(call(mask, weight.double(), vector, vector), op, "weight", "got Double")
    refused(call(mask[:3], weight, vector, vector), op, "mask", "shape [4, 12]", "got [3, 12]")
    refused(call(mask.float(), weight, vector, vector), op, "mask", "Bool", "got Float")
    refused(call(mask.t().contiguous().t(), weight, vector, vector), op, "mask", "contiguous columns")
    refused(call(mask, weight, vector[:11], vector), op, "variance", "shape [12]", "got [11]")
    refused(call(mask, weight, vector.double(), vector), op, "variance", "Float", "got Double")
    refused(call(mask, weight, vector, torch.ones(24)[::2]), op, "mean", "contiguous")
    refused(call(mask, weight, vector, vector.to("meta")), op, "mean", "on cpu", "got meta")
    refused(call(mask, weight, -vector, vector), op, "variance", "not be negative", "got -1 at index [0]")
    refused(call(mask, weight, vector, vector, 8), op, "group_m", "divide the 12 columns")
    refused(call(mask, weight, vector, vector, 33), op, "group_m", "from 1 to 32", "got 33")
    refused(call(mask, weight, vector, vector, 0, -1), op, "rounds", "not be negative", "got -1")
