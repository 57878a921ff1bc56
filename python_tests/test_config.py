import pytest

from ace_ext import InputError, PruneConfig, SparsityPattern
from ace_ext.config import keep_count


@pytest.mark.parametrize(
    ("size", "sparsity", "keep"),
    [(10, 0.5, 5), (11, 0.5, 5), (10, 0.25, 7), (3, 1 / 3, 2), (7, 0.0, 7), (7, 1.0, 0), (0, 0.5, 0), (1, 0.49, 1)],
)
def test_keep_count_rounds_the_pruned_half_up(size, sparsity, keep):
    assert keep_count(size, sparsity) == keep


def test_defaults():
    config = PruneConfig()
    assert (config.metric, config.sparsity, config.group, config.order) == ("ace", 0.5, "row", "sequential")


def test_pattern_sets_sparsity():
    config = PruneConfig(pattern="1:4")
    assert config.pattern == SparsityPattern(1, 4)
    assert config.sparsity == 0.75
    assert config.to_dict()["pattern"] == "1:4"


def test_group_model_walks_dense_blocks():
    assert PruneConfig(group="model").order == "block"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity must be a share of zeros from 0 to 1 \(got 1.5\)"),
        ({"sparsity": -0.1}, r"sparsity must be .* \(got -0.1\)"),
        ({"sparsity": float("nan")}, r"sparsity must be .* \(got nan\)"),
        ({"pattern": "3:2"}, r"pattern must be N:M with 0 < N < M <= 32.*\(got 3:2\)"),
        ({"pattern": "0:4"}, r"pattern must be N:M"),
        ({"pattern": "2:64"}, r"pattern must be N:M"),
        ({"pattern": "two:four"}, r"pattern must be N:M.*'two:four'"),
        ({"pattern": "2:4:8"}, r"pattern must be N:M"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"give sparsity or pattern, not both"),
        ({"pattern": "2:4", "group": "matrix"}, r"group must be row"),
        ({"metric": "wonda"}, r"metric must be one of magnitude, wanda.*'wonda'"),
        ({"group": "column"}, r"group must be one of row, matrix, model"),
        ({"order": "random"}, r"order must be one of block, sequential"),
        ({"group": "model", "order": "sequential"}, r"order must be block"),
        ({"batch_tokens": 0}, r"batch_tokens must be at least 1"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(**arguments)
