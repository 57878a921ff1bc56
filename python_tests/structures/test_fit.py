"""Scores and least squares against their definitions, in float64."""

import pytest
import torch

from ace_ext.structures.moments import RIDGES, Moments, fitted, updated
from ace_ext.structures.scores import greedy, kept_units, turning


def random(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(h, scale=None) -> Moments:
    found, scale = Moments(h.shape[1], torch.device("cpu")), torch.ones(len(h)) if scale is None else scale.float()
    for part in torch.arange(len(h)).split(7):
        found.add_(h[part], scale[part])
    return found


def test_the_error_is_that_of_the_outputs():
    h, change, offset, scale = random(50, 9), random(4, 9, seed=1), random(4, seed=2), random(50, seed=3).abs()
    for e in (None, offset):
        output = h @ change.T + (0 if e is None else e)
        expected = float((output.square().sum(1) * scale.square()).sum() / scale.square().sum())
        found = moments(h, scale).error(change.float(), None if e is None else e.float())
        assert found == pytest.approx(expected, rel=1e-4)


def test_removed_inputs_that_others_determine_cost_nothing():
    """The even columns determine the odd ones but for a constant, which goes into the bias."""
    h, kept = random(400, 12), torch.arange(0, 12, 2)
    h[:, 1::2] = h[:, kept] @ random(6, 6, seed=2) + random(6, seed=3)
    weight, bias = random(4, 12, seed=4), random(4, seed=5)
    fit = fitted(moments(h[:300]), moments(h[300:]), kept, weight.float(), bias.float())
    assert fit.ridge == RIDGES[-1]
    assert fit.bias is not None
    found = h[:, kept] @ fit.weight.double().T + fit.bias.double()
    torch.testing.assert_close(found, h @ weight.T + bias, atol=1e-3, rtol=0)


def test_the_fit_is_weighted_least_squares():
    h, kept, removed = random(300, 8), torch.arange(5), torch.arange(5, 8)
    weight, scale = random(3, 8, seed=1), random(300, seed=2).abs()
    fit = fitted(moments(h[:200], scale[:200]), moments(h[200:], scale[200:]), kept, weight.float(), None)
    if fit.ridge is not None:
        gram = (h * scale[:, None]).T @ (h * scale[:, None]) / scale.square().sum()
        own = gram[kept][:, kept]
        own = own + fit.ridge * own.diagonal().mean() * torch.eye(5, dtype=torch.float64)
        expected = weight[:, kept] + torch.linalg.solve(own, gram[kept][:, removed] @ weight[:, removed].T).T
        torch.testing.assert_close(fit.weight.double(), expected, atol=1e-4, rtol=1e-4)
    assert fit.error <= fit.error_before


def test_a_fit_that_does_not_help_held_out_tokens_is_not_used():
    """Removed inputs that have nothing in common with those that stay: least squares fits noise of few tokens."""
    kept, weight = torch.arange(30), random(4, 40, seed=1).float()
    fit = fitted(moments(random(40, 40)), moments(random(500, 40, seed=2)), kept, weight, None)
    assert fit.error <= fit.error_before
    if fit.ridge is None:
        assert torch.equal(fit.weight, weight[:, :30])


def test_no_held_out_tokens_no_fit():
    weight = random(4, 8, seed=2).float()
    fit = fitted(moments(random(40, 8)), Moments(8, torch.device("cpu")), torch.arange(4), weight, None)
    assert fit.ridge is None
    assert torch.equal(fit.weight, weight[:, :4])


def test_inputs_that_are_always_zero_break_nothing():
    weight = random(4, 8, seed=2).float()
    fit = fitted(moments(torch.zeros(40, 8)), moments(torch.zeros(9, 8)), torch.arange(4), weight, None)
    assert torch.equal(fit.weight, weight[:, :4])


def test_a_bias_takes_the_mean_of_what_goes():
    h, kept = random(300, 8) + random(8, seed=3), torch.arange(0, 8, 2)
    weight, bias = random(3, 8, seed=1), random(3, seed=2)
    fit = updated(moments(h), kept, weight.float(), bias.float(), "bias", 0.0)
    assert torch.equal(fit.weight, weight[:, kept].float())
    error = h[:, kept] @ fit.weight.double().T + fit.bias.double() - (h @ weight.T + bias)
    torch.testing.assert_close(error.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(error.square().sum(1).mean()) == pytest.approx(fit.error, rel=1e-4)
    assert fit.error < fit.error_before
    plain = updated(moments(h), kept, weight.float(), None, "bias", 0.0)
    assert (plain.bias, plain.error) == (None, plain.error_before)


def test_least_squares_without_held_out_tokens():
    h, kept = random(300, 8) @ random(8, 8, seed=3), torch.arange(5)
    weight = random(3, 8, seed=1)
    fit = updated(moments(h), kept, weight.float(), None, "matrix", 0.01)
    gram = h.T @ h / 300
    own = gram[kept][:, kept]
    ridge = 0.01 * own.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    target = weight @ gram[:, kept] + weight[:, kept] @ ridge
    torch.testing.assert_close(fit.weight.double(), target @ torch.linalg.inv(own + ridge), atol=1e-3, rtol=1e-3)
    assert (fit.ridge, fit.error < fit.error_before) == (0.01, True)


def test_scores_of_published_methods():
    """Two columns a head: FLAP squares its columns' scores there, Wanda-sp adds them."""
    h, weight = random(400, 8) * random(8, seed=1) + random(8, seed=2), random(3, 8, seed=3)
    flap = h.var(0, correction=0) * weight.square().sum(0)
    wanda = (weight.abs() * h.square().sum(0).sqrt()).sum(0)
    own, matrix = moments(h), weight.float()
    for name, columns, heads in (("flap", flap, flap.square()), ("wanda-sp", wanda, wanda)):
        units = kept_units(f"published-{name}", 5, matrix, own, None)
        assert units.tolist() == sorted(columns.topk(5).indices.tolist())
        groups = kept_units(f"published-{name}", 2, matrix, own, None, width=2)
        assert groups.tolist() == sorted(heads.view(4, 2).sum(1).topk(2).indices.tolist())


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
