import pytest
import torch

from ace_ext import InputError, PruneConfig
from ace_ext.ops import reference
from ace_ext.pruning.masks import (
    ScoredWeight,
    keep_budget,
    keep_of_group,
    prune_model_wide_,
    scored_weight,
)
from ace_ext.pruning.stages import Score


def magnitude(weight):
    return ScoredWeight(weight, "magnitude", None, None)


def prune_(scored, config, keep_row=None):
    config.comparison.prune_(scored, keep_of_group(scored.weight, config, keep_row))


@pytest.mark.parametrize(
    "config", [{"sparsity": 0.3}, {"group": "matrix", "sparsity": 0.7}, {"pattern": "1:4"}], ids=str
)
def test_budget_is_what_survives(config):
    config = PruneConfig("magnitude", **config)
    weight = torch.randn(7, 12)
    prune_(magnitude(weight), config)
    assert int(weight.count_nonzero()) == keep_budget(weight, config)


@pytest.mark.parametrize("keep", [None, 0, 5, 12])
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_keep_of_a_row_replaces_the_sparsity(group, keep):
    config = PruneConfig("magnitude", group=group, sparsity=0.25)
    weight = torch.randn(7, 12)
    mask = config.comparison.mask(magnitude(weight), keep_of_group(weight, config, keep))
    prune_(magnitude(weight), config, keep)
    assert torch.equal(mask, weight != 0)
    assert int(weight.count_nonzero()) == keep_budget(weight, config, keep) == 7 * (9 if keep is None else keep)


@pytest.mark.parametrize(
    "config", [{"sparsity": 0.3}, {"group": "matrix", "sparsity": 0.7}, {"pattern": "1:4"}], ids=str
)
def test_mask_is_what_pruning_keeps(config):
    config = PruneConfig("magnitude", **config)
    weight = (torch.randn(7, 12) * 2).round() / 2 + 0.25  # ties, no zeros
    mask = config.comparison.mask(magnitude(weight), keep_of_group(weight, config))
    prune_(magnitude(weight), config)
    assert torch.equal(mask, weight != 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_model_wide_equals_the_oracle(sparsity, ties):
    torch.manual_seed(1)
    weights = [torch.randn(5, 33), torch.randn(1, 8).half(), torch.randn(40, 3).bfloat16(), torch.zeros(0, 4)]
    if ties:
        weights = [(w.float() * 2).round().to(w.dtype) / 2 for w in weights]
    scores = [w.float().abs() for w in weights]
    size = sum(w.numel() for w in weights)
    masks = reference.keep_mask_model(scores, size - int(size * sparsity + 0.5))
    expected = [torch.where(mask, w, torch.zeros_like(w)) for w, mask in zip(weights, masks, strict=True)]
    prune_model_wide_([magnitude(w) for w in weights], sparsity)
    for weight, right in zip(weights, expected, strict=True):
        assert torch.equal(weight, right)


def test_model_wide_meets_nan_before_it_writes():
    weights = [torch.ones(2, 2), torch.tensor([[1.0, float("nan")]])]
    with pytest.raises(ValueError, match="weight must be finite"):
        prune_model_wide_([magnitude(w) for w in weights], 1.0)
    assert (weights[0] == 1).all()


def test_callable_metric():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    config = PruneConfig(Score(lambda weight, stats: -weight.abs()), 0.5)
    prune_(scored_weight(weight, None, config), config)
    assert weight.tolist() == [[1.0, -2.0, 0.0, 0.0]]


def test_a_callable_metric_that_computes_in_place():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    config = PruneConfig(Score(lambda weight, stats: weight.abs_()), 0.5)
    prune_(scored_weight(weight, None, config), config)
    assert weight.tolist() == [[0.0, 0.0, 3.0, -4.0]]


@pytest.mark.parametrize(
    "answer",
    [
        *(None, torch.ones(2, 2), torch.ones(1, 4, dtype=torch.int64)),
        *(torch.ones(1, 4).to_sparse(), torch.ones(1, 4, device="meta")),
    ],
    ids=["nothing", "another-shape", "another-dtype", "sparse", "meta"],
)
def test_callable_metric_must_return_scores(answer):
    with pytest.raises(InputError, match=r"metric must return a float tensor of the weight's shape \[1, 4\] \(got"):
        scored_weight(torch.ones(1, 4), None, PruneConfig(Score(lambda weight, stats: answer)))
