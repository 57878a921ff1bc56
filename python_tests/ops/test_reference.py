"""The oracle against hand-computed cases, other formulas and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import DTYPES, FORMULAS, SCORE_ROUNDINGS, UNIT, expected_histogram, expected_mask_at, order_key

from ace_ext.ops import reference
from ace_ext.pruning.metrics import METRICS

F64 = torch.float64


def normal(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + mean


def close(actual, expected, rtol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


# Statistics


def test_moments_by_hand():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    weight_sum, mean, m2 = reference.moments(x, torch.tensor([1.0, 3.0]))
    assert weight_sum == 4
    assert mean.tolist() == [2.5, 5.0]
    assert m2.tolist() == [3.0, 0.0]  # 1.5^2 + 3 * 0.5^2


def test_moments_match_numpy():
    x = normal(129, 5, mean=3.0)
    weight = normal(129, seed=1).abs()
    plain, weighted = reference.moments(x), reference.moments(x, weight)
    close(plain.m2 / plain.weight_sum, torch.from_numpy(np.var(x.numpy(), axis=0)))
    average = np.average(x.numpy(), axis=0, weights=weight.numpy())
    close(weighted.mean, torch.from_numpy(average))
    covariance = np.cov(x.numpy(), rowvar=False, aweights=weight.numpy(), ddof=0)
    close(weighted.m2 / weighted.weight_sum, torch.from_numpy(np.diag(covariance).copy()))


def test_moments_give_the_sum_of_squares():
    x = normal(50, 4, mean=2.0)
    state = reference.moments(x)
    close(state.m2 + state.weight_sum * state.mean**2, (x**2).sum(0))


def test_moments_of_nothing_are_zero():
    for state in (reference.moments(torch.zeros(0, 3)), reference.moments(normal(4, 3), torch.zeros(4))):
        assert state.weight_sum == 0
        assert state.mean.tolist() == [0, 0, 0]
        assert state.m2.tolist() == [0, 0, 0]


@pytest.mark.parametrize("cut", [0, 1, 40, 99, 100])
def test_chans_merge_gives_the_whole(cut):
    x, weight = normal(100, 3, mean=7.0), normal(100, seed=1).abs()
    merged = reference.merge(reference.moments(x[:cut], weight[:cut]), reference.moments(x[cut:], weight[cut:]))
    for part, whole in zip(merged, reference.moments(x, weight), strict=True):
        close(part, whole)


def test_merge_by_hand():
    one = (torch.tensor(1.0), torch.tensor([1.0]), torch.tensor([0.0]))
    three = (torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([2.0]))
    weight_sum, mean, m2 = reference.merge(one, three)
    assert (weight_sum, mean, m2) == (4, 2.5, 5.0)  # 0 + 2 + 2^2 * 1 * 3 / 4


def test_merge_with_an_empty_side_keeps_the_bits():
    full = reference.moments(normal(7, 3))
    empty = reference.moments(torch.zeros(0, 3))
    for merged in (reference.merge(full, empty), reference.merge(empty, full)):
        assert all(torch.equal(part, whole) for part, whole in zip(merged, full, strict=True))


def test_inverse_square_norm_by_hand():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-0.5, 0.0]])
    assert reference.inverse_square_norm(a).tolist() == [1 / 25, 0.0, 4.0]


def test_cosine_moment_is_its_sum():
    x, a = normal(9, 4), normal(9, 3, seed=1)
    a[2] = 0  # a token without output has no cosine to lose
    expected = torch.zeros(3, 4, dtype=F64)
    for t in range(9):
        norm = a[t].norm()
        for i in range(3):
            for j in range(4):
                expected[i, j] += 0 if norm == 0 else (a[t, i] * x[t, j] / norm**2) ** 2
    close(reference.cosine_moment(x, a), expected)


# The derivation: brute force against the second-order formula


def cosp_exact(weight, x):
    a = x @ weight.T
    column = reference.column_factor("cosp-exact", x, a)
    return reference.score(weight, "cosp_exact", column, reference.cosine_moment(x, a))


def test_cosine_loss_by_hand():
    # A = (3, 4); without W_00 it is (0, 4): the cosine falls from 1 to 4/5. Without W_10 it is (3, 0).
    loss = reference.exact_cosine_loss(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0]]))
    close(loss, torch.tensor([[1 - 4 / 5], [1 - 3 / 5]], dtype=F64))


def test_cosine_loss_of_tokens_without_a_direction():
    weight = torch.tensor([[2.0, 0.0]])
    loss = reference.exact_cosine_loss(weight, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert loss.tolist() == [[1.0, 0.0]]  # token 0 is zero anyway; token 1 becomes zero without W_00


def test_cosine_loss_matches_the_plain_cosine():
    weight, x = normal(4, 3), normal(6, 3, seed=1)
    dense, pruned = x @ weight.T, weight.clone()
    pruned[2, 1] = 0
    expected = (1 - torch.nn.functional.cosine_similarity(dense, x @ pruned.T)).sum()
    close(reference.exact_cosine_loss(weight, x)[2, 1], expected, rtol=1e-9)  # 1 - cos cancels there


def test_cosp_exact_is_the_loss_to_second_order():
    # The remainder is of third order in the removed weight: ten times smaller weights, a tenth of the relative error.
    x, errors = normal(20, 5, seed=1, mean=0.5), []
    for scale in (1e-1, 1e-2, 1e-3, 1e-4):
        weight = normal(4, 5)
        weight[:, 2] *= scale
        ratio = cosp_exact(weight, x)[:, 2] ** 2 / reference.exact_cosine_loss(weight, x)[:, 2]
        errors.append((ratio - 1).abs().max().item())
    assert errors[-1] < 1e-3
    for before, after in itertools.pairwise(errors):
        assert 5 < before / after < 20


def test_the_first_order_of_the_loss_cancels():
    # Were it there, the loss would fall by 10 and not by 100 with the weight.
    x, losses = normal(20, 5, seed=1), []
    for scale in (1e-3, 1e-4):
        weight = normal(4, 5)
        weight[:, 2] *= scale
        losses.append(reference.exact_cosine_loss(weight, x)[:, 2])
    close(losses[0] / losses[1], torch.full((4,), 100.0, dtype=F64), rtol=0.02)


def test_varp_is_the_mean_squared_difference_between_tokens():
    # Removing W_ij changes E |A_s - A_t|^2 over pairs of tokens, in what column j alone adds, by 2 W_ij^2 sigma_j^2.
    x, weight = normal(30, 4, mean=1.0), normal(3, 4, seed=1)
    score = reference.score(weight, "scaled", reference.column_factor("varp", x))
    alone = weight[1, 2] * x[:, 2]
    close((alone[:, None] - alone[None, :]).square().mean(), 2 * score[1, 2] ** 2)


# Scores


def test_column_factors_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    a = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # r = 1/4, 1
    m = (0.25 * 1 + 3) / 1.25
    weighted = 0.25 * (1 - m) ** 2 + (3 - m) ** 2
    expected = {
        "wanda": [math.sqrt(10), math.sqrt(8)],
        "ria": [10**0.25, 8**0.25],
        "stade": [1, 0],
        "varp": [1, 0],
        "cosp": [math.sqrt(10), math.sqrt(8)],
        "ace": [math.sqrt(10), 0],
        "cosp-exact": [0.25 + 9, 1 + 4],
        "cosvar": [math.sqrt(weighted), 0],
        "norm-cosvar": [math.sqrt(math.sqrt(10) * math.sqrt(weighted)), 0],
    }
    assert {*expected, "magnitude"} == set(METRICS)
    assert reference.column_factor("magnitude", x) is None
    for metric, values in expected.items():
        close(reference.column_factor(metric, x, a), torch.tensor(values, dtype=F64))
    close(reference.column_factor("ria", x, exponent=1.0), torch.tensor(expected["wanda"], dtype=F64))


def test_scores_by_hand():
    weight = torch.tensor([[1.0, -3.0], [0.0, 1.0]])
    column, moment = torch.tensor([2.0, 10.0]), torch.tensor([[0.25, 4.0], [1.0, 16.0]])
    expected = {
        "magnitude": [[1, 3], [0, 1]],
        "scaled": [[2, 30], [0, 10]],
        "ria": [[(1 + 1 / 4) * 2, (3 / 4 + 3 / 4) * 10], [0, (1 / 4 + 1) * 10]],
        "cosp": [[2 * 0.5, 30 * 6], [0, 10 * 4]],
        "cosp_exact": [[math.sqrt(0.875), 3 * math.sqrt(3)], [0, 0]],
        "score": [[0.25, 4], [1, 16]],
    }
    assert set(expected) == {*FORMULAS, "score"}
    for formula, values in expected.items():
        close(reference.score(weight, formula, column, moment), torch.tensor(values, dtype=F64))


def test_cosp_counts_the_first_order_loss_of_every_token():
    x, weight = normal(8, 3), normal(2, 3, seed=1)
    a = x @ weight.T
    score = reference.score(weight, "cosp", reference.column_factor("cosp", x), reference.cosine_moment(x, a))
    for i in range(2):
        for j in range(3):
            wanda = weight[i, j].abs() * x[:, j].norm()
            loss = ((a[:, i] * x[:, j] / a.square().sum(1)) ** 2).sum().sqrt()
            close(score[i, j], wanda * weight[i, j].abs() * loss)


@pytest.mark.parametrize("formula", FORMULAS)
def test_float32_scores_are_float32_roundings_of_the_float64_ones(formula):
    weight, column, moment = (
        normal(7, 9).float(),
        normal(9, seed=1).abs().float() + 3,
        normal(7, 9, seed=2).abs().float(),
    )
    narrow = reference.score(weight, formula, column, moment, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    close(narrow.double(), reference.score(weight, formula, column, moment), rtol=SCORE_ROUNDINGS * UNIT)


# Masks


def test_keep_mask_by_hand():
    score = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-1.0, -0.0, 0.0, -2.0]])
    assert reference.keep_mask(score, 2).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert reference.keep_mask(score, 1).int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert reference.keep_mask(score, 5, "matrix").int().tolist() == [[1, 1, 1, 1], [0, 1, 0, 0]]
    assert reference.keep_mask_nm(score, 1, 2).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    first, second = reference.keep_mask_model([score[1:], score], 5)
    assert first.int().tolist() == [[0, 1, 0, 0]]  # a tie with the second matrix's zeros: the earlier matrix wins
    assert second.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_threshold_by_hand():
    score = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -0.0, -2.0]])
    assert reference.threshold(score, 2).tolist() == [2.0, -1.0]
    assert reference.threshold(score, 0).tolist() == [math.inf, math.inf]
    assert reference.threshold(score, 4, "matrix").tolist() == [0.0]
    assert not torch.signbit(reference.threshold(score, 1))[1]
    assert reference.threshold(torch.zeros(2, 0), 0).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prune_writes_positive_zeros_into_a_copy(dtype):
    weight = torch.tensor([[-1.0, -0.0, 2.0]], dtype=dtype)
    pruned = reference.prune(weight, torch.tensor([[False, True, True]]))
    assert pruned.dtype == dtype
    assert pruned.tolist() == [[0.0, 0.0, 2.0]]
    assert torch.signbit(pruned).tolist() == [[False, True, False]]
    assert weight[0, 0] == -1


def test_masks_refuse_nan():
    with pytest.raises(ValueError, match="finite"):
        reference.keep_mask(torch.tensor([[1.0, math.nan]]), 1)


def test_order_keys_sort_like_scores():
    score = torch.cat([normal(500).float(), torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])])
    order = np.argsort(order_key(score), kind="stable")
    assert np.array_equal(order, np.argsort(score.numpy(), kind="stable"))
    assert order_key(torch.tensor([0.0, -0.0, 1.0])).tolist() == [0x80000000, 0x80000000, 0xBF800000]


def test_histogram_counts_digits_under_the_prefix():
    score = torch.tensor([[1.0, 1.0, -1.0]])  # keys 0xbf800000 twice, 0x407fffff
    top = expected_histogram(score, 0, 0)
    assert top.shape == (2048,)
    assert (top[0xBF800000 >> 21], top[0x407FFFFF >> 21], top.sum()) == (2, 1, 3)
    low = expected_histogram(score, 0x407FFFFF, 2)
    assert low.shape == (1024,)
    assert (low[0x3FF], low.sum()) == (1, 1)


def test_expected_mask_at_deals_ties_row_major():
    score = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    assert expected_mask_at(score, 0xBF800000, 2).int().tolist() == [[1, 1], [1, 0]]


# Solvers


def test_swaps_by_hand():
    # Two inputs that cancel (G_01 = -1): both removed lose nothing. The third is independent.
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight, mask = torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([[True, False, True]])
    assert reference.swap_loss(mask, weight, gram).tolist() == [4.0]
    refined, swaps = reference.refine_swaps(mask, weight, gram)
    assert refined.tolist() == [[True, True, False]]  # restore 1, remove 2: a loss of 1
    assert swaps.tolist() == [1]
    assert reference.swap_loss(refined, weight, gram).tolist() == [1.0]
    assert mask.tolist() == [[True, False, True]]


def test_swaps_stay_in_their_group():
    weight, gram = torch.tensor([[1.0, 5.0, 2.0, 3.0]]), torch.eye(4)
    mask = torch.tensor([[True, False, False, True]])
    assert reference.refine_swaps(mask, weight, gram, 1, 2)[0].tolist() == [[False, True, False, True]]
    assert reference.refine_swaps(mask, weight, gram)[0].tolist() == [[False, True, False, True]]
    assert reference.refine_swaps(~mask, weight, gram, max_swaps=0)[0].tolist() == (~mask).tolist()


def test_the_recursion_by_hand():
    weight, factor = torch.tensor([[4.0, 3.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.5], [9.0, 1.0, 3.0], [9.0, 9.0, 1.0]])
    solved, error, _ = reference.obs_block(weight, torch.tensor([[False, False, True]]), factor)
    assert error.tolist() == [[2.0, 1.0, 0.0]]  # 4 / 2; (3 - 2 * 1) / 1
    assert solved.tolist() == [[0.0, 0.0, -3.0]]  # 1 - 2 * 0.5 - 1 * 3
    _, _, mask = reference.obs_block(
        torch.tensor([[4.0, 3.0]]), torch.ones(1, 2).bool(), torch.diag(factor[0, :2]), 1, 2
    )
    assert mask.tolist() == [[False, True]]  # 4 / 2 < 3 / 1
