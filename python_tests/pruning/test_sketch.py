"""The sketch of the Gram matrix against the matrix itself, and ADMM on it."""

import pytest
import torch

from ace_ext import InputError, PruneConfig
from ace_ext.pruning.damping import penalty
from ace_ext.pruning.gram import GramState, RelativeLoss
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.sketch import DIRECTIONS, LEAST_RESIDUAL, SketchState
from ace_ext.pruning.stages import Admm
from ace_ext.pruning.statistics import LinearStatistics, MomentState

TOKENS, WIDE = 600, 160


def correlated(columns: int = WIDE, seed: int = 0) -> torch.Tensor:
    """Inputs like those of a model: a mean, a few strong directions, and noise in each column."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(12, columns, generator=random) * torch.linspace(3, 0.5, 12)[:, None]
    noise = torch.rand(columns, generator=random) + 0.2
    latent = torch.randn(TOKENS, 12, generator=random)
    return latent @ directions + noise * torch.randn(TOKENS, columns, generator=random) + 0.5


def states(x: torch.Tensor) -> tuple[SketchState, GramState]:
    sketch, gram = SketchState(x.shape[1]), GramState(x.shape[1])
    sketch.update(x)
    gram.update(x)
    return sketch, gram


def approximation(sketch: SketchState) -> torch.Tensor:
    diagonal, directions = (part.double() for part in sketch.factors())
    return torch.diag(diagonal) + directions.T @ directions


def test_product_and_squares_are_those_of_the_gram_matrix(monkeypatch, dtype):
    monkeypatch.setattr("ace_ext.pruning.gram.CHUNK_TOKENS", 7)
    x = correlated(20).to(dtype)
    kept = x.clone()
    sketch, _ = states(x)
    assert torch.equal(x, kept)  # inputs are never written
    wide = x.double()
    gram = wide.T @ wide
    torch.testing.assert_close(sketch.squares, gram.diagonal(), rtol=1e-5, atol=1e-5)
    identity = SketchState(20)
    identity.update(torch.eye(20))
    torch.testing.assert_close(sketch.product.double(), gram @ identity.product.double(), rtol=1e-4, atol=1e-2)


def test_keeps_the_diagonal_and_the_strong_directions():
    sketch, gram = states(correlated())
    found, true = approximation(sketch), gram.matrix.double()
    torch.testing.assert_close(found.diagonal(), true.diagonal(), rtol=1e-4, atol=1e-4)
    off = ~torch.eye(WIDE, dtype=torch.bool)
    assert (found - true)[off].norm() < 0.1 * true[off].norm()
    assert sketch.factors()[0].min() >= 0.9 * LEAST_RESIDUAL * sketch.squares.min()
    assert sketch.product.shape == (WIDE, DIRECTIONS)


def test_of_few_columns_it_is_the_gram_matrix():
    sketch, gram = states(correlated(30))  # no more columns than directions
    off = ~torch.eye(30, dtype=torch.bool)
    difference = approximation(sketch) - gram.matrix.double()
    assert difference[off].norm() < 0.01 * gram.matrix[off].norm()


@pytest.mark.parametrize(("damping", "floor"), [(0.0, 0.0), (0.1, 0.2), (1.0, 0.0)])
@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_admm_factor_is_that_of_the_normalised_approximation(damping, floor, relaxation, random):
    sketch, _ = states(correlated())
    factor = sketch.admm_factor(damping, floor, relaxation)
    least = floor * sketch.squares.log().mean().exp()
    norm = (sketch.squares + least).sqrt()
    hessian = (approximation(sketch) + least * torch.eye(WIDE)) / norm / norm[:, None] + damping * torch.eye(WIDE)
    rho = penalty(damping)
    inverse = torch.linalg.inv(hessian + rho * torch.eye(WIDE))
    rows = torch.randn(5, WIDE, generator=random)
    step = relaxation * rho * inverse + (1 - relaxation) * torch.eye(WIDE)
    torch.testing.assert_close(factor.times(rows).double(), rows.double() @ step, rtol=1e-4, atol=2e-4)
    diagonal = torch.linalg.inv(hessian).diagonal()
    torch.testing.assert_close(factor.inverse_diagonal.double(), diagonal, rtol=2e-3, atol=1e-3)
    assert sketch.admm_factor(damping, floor, relaxation) is factor
    sketch.update(torch.ones(1, WIDE))
    assert sketch.admm_factor(damping, floor, relaxation) is not factor


def test_merged_ranks_are_one_state():
    x = correlated()
    whole, _ = states(x)
    first, second = SketchState(WIDE), SketchState(WIDE)
    first.update(x[:100])
    second.update(x[100:])
    first.merge_(second)
    torch.testing.assert_close(first.product, whole.product, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(first.squares, whole.squares, rtol=1e-5, atol=0.0)  # each chunk is a float32 sum
    assert first.tokens == whole.tokens == TOKENS


def test_survives_a_file():
    sketch, _ = states(correlated())
    again = SketchState.of_tensors(sketch.tensors())
    assert again.tokens == TOKENS
    assert all(torch.equal(a, b) for a, b in zip(again.factors(), sketch.factors(), strict=True))


def statistics(x: torch.Tensor, gram: str) -> LinearStatistics:
    sketch, whole = states(x)
    moments = MomentState(x.shape[1])  # of Wanda's mask
    moments.update(x)
    return LinearStatistics(moments, None, None, sketch if gram == "sketch" else whole, TOKENS)


@pytest.mark.parametrize("what", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.7}])
def test_admm_on_a_sketch_comes_near_admm_on_the_matrix(what, random):
    x, dense = correlated(), torch.randn(40, WIDE, generator=random)
    _, truth = states(x)
    losses, alone = {}, dense.clone()
    prune_linear_(alone, statistics(x, "plain"), PruneConfig("wanda", **what))
    for gram in ("plain", "sketch"):
        weight, stats = dense.clone(), statistics(x, gram)
        solution = prune_linear_(weight, stats, PruneConfig(Admm(gram=gram), **what))
        losses[gram] = RelativeLoss(truth.energy, dense)(weight)
        keep = round(WIDE * (1 - PruneConfig("magnitude", **what).sparsity))
        assert (weight != 0).sum(1).tolist() == [keep] * 40
        assert solution.loss_before is None
        assert solution.loss_after < RelativeLoss(stats.gram.energy, dense)(alone)
    plain = dense.clone()
    prune_linear_(plain, statistics(x, "plain"), PruneConfig("magnitude", **what))
    assert losses["sketch"] < 1.1 * losses["plain"] < 0.5 * RelativeLoss(truth.energy, dense)(plain)


def test_dead_columns_stay_zero(random):
    x = correlated()
    x[:, [3, 77]] = 0.0
    weight = torch.randn(8, WIDE, generator=random)
    prune_linear_(weight, statistics(x, "sketch"), PruneConfig("admm(gram=sketch)"))
    assert not weight[:, [3, 77]].any()
    assert torch.isfinite(weight).all()


def test_no_token_and_zeros_are_no_error(random):
    for x in (torch.zeros(0, WIDE), torch.zeros(5, WIDE)):
        sketch, _ = states(x)
        assert RelativeLoss(sketch.energy, torch.ones(1, WIDE))(torch.zeros(1, WIDE)) == 0.0
        assert torch.isfinite(sketch.admm_factor(0.1).inverse_diagonal).all()


def test_sums_that_are_not_finite_are_refused():
    sketch, _ = states(torch.full((3, WIDE), float("inf")))
    with pytest.raises(InputError, match="sketch of the inputs is not finite"):
        sketch.factors()
