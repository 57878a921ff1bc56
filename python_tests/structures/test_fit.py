"""Scores and least squares against their definitions, in float64."""

import pytest
import torch

from ace_ext.structures.moments import RIDGES, Moments, fitted
from ace_ext.structures.scores import greedy, turning


def random(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(h, y) -> Moments:
    found = Moments(h.shape[1], y.shape[1], torch.device("cpu"))
    for part in torch.arange(len(h)).split(7):
        found.add_(h[part], y[part])
    return found


def test_the_error_is_that_of_the_outputs():
    h, y, weight, bias = random(50, 9), random(50, 4, seed=1), random(4, 5, seed=2), random(4, seed=3)
    kept = torch.tensor([0, 2, 3, 5, 8])
    for b in (None, bias):
        output = h[:, kept] @ weight.T + (0 if b is None else b)
        expected = float((output - y).square().sum(1).mean())
        assert moments(h, y).error(kept, weight, b) == pytest.approx(expected, rel=1e-5)


def test_neurons_that_determine_the_target_are_fitted_exactly():
    h, kept = random(400, 12), torch.arange(0, 12, 2)
    truth, bias = random(4, 6, seed=2), random(4, seed=3)
    y = h[:, kept] @ truth.T + bias
    fit = fitted(
        moments(h[:300], y[:300]), moments(h[300:], y[300:]), kept, random(4, 12, seed=4).float(), bias.float()
    )
    assert fit.ridge == RIDGES[0]
    torch.testing.assert_close(fit.weight.double(), truth, atol=1e-4, rtol=0)
    assert fit.bias is not None
    torch.testing.assert_close(fit.bias.double(), bias, atol=1e-4, rtol=0)


def test_a_fit_that_does_not_help_held_back_tokens_is_not_used():
    """The target is noise: least squares fits it on the few tokens that it sees."""
    h, kept, weight = random(40, 30), torch.arange(30), torch.zeros(4, 30)
    train, held = moments(h, random(40, 4, seed=1)), moments(random(500, 30, seed=2), random(500, 4, seed=3))
    fit = fitted(train, held, kept, weight, None)
    assert fit.error <= fit.error_before
    if fit.ridge is None:
        assert torch.equal(fit.weight, weight)


def test_no_held_back_tokens_no_fit():
    h, y = random(40, 8), random(40, 4, seed=1)
    weight = random(4, 8, seed=2).float()
    empty = Moments(8, 4, torch.device("cpu"))
    fit = fitted(moments(h, y), empty, torch.arange(4), weight, None)
    assert fit.ridge is None
    assert torch.equal(fit.weight, weight[:, :4])


def test_greedy_removes_what_costs_least_one_after_the_other():
    """By definition: of all neurons, the one without which least squares has the lowest loss."""
    h = random(200, 10) @ random(10, 10, seed=5)
    weight = random(3, 10, seed=6)
    gram = h.T @ h / 200
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)

    def loss(kept):
        w = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        change = weight.clone()
        change[:, kept] -= w
        return float((change @ damped * change).sum())

    left = list(range(10))
    for _ in range(4):
        left.remove(min(left, key=lambda j: loss([i for i in left if i != j])))
    assert greedy(weight, gram, 6).tolist() == left


def test_greedy_takes_several_in_a_step():
    h = random(500, 64)
    found = greedy(random(8, 64, seed=1), h.T @ h / 500, 32, rounds=4)
    assert len(found) == len(set(found.tolist())) == 32
    assert found.tolist() == sorted(found.tolist())


def test_two_equal_neurons_do_not_go_in_one_step():
    h = random(500, 8)
    h[:, 7] = h[:, 3]
    weight = random(4, 8, seed=1)
    weight /= weight.norm(dim=0)
    found = greedy(weight, h.T @ h / 500, 6, rounds=1).tolist()
    assert len({3, 7} & {*found}) >= 1


def test_turning_is_the_change_of_direction():
    """To second order, so with small contributions."""
    h, weight, rest = 1e-3 * random(30, 6), random(16, 6, seed=1), random(30, 16, seed=2)
    output = rest + h @ weight.T
    for j, found in enumerate(turning(h, output, weight.float()).tolist()):
        without = output - h[:, j, None] * weight[:, j]
        exact = 2 * float((1 - torch.cosine_similarity(output, without, dim=1)).sum())
        assert found == pytest.approx(exact, rel=0.02)
