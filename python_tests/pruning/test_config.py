import pytest

from ace_ext import InputError, PruneConfig, SparsityPattern
from ace_ext.pruning.config import all_settings
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, INPUT, SKETCH, WEIGHTED
from ace_ext.pruning.pattern import keep_count
from ace_ext.pruning.solver_config import SolverConfig


@pytest.mark.parametrize(
    ("size", "sparsity", "keep"),
    [(10, 0.5, 5), (11, 0.5, 5), (10, 0.25, 7), (3, 1 / 3, 2), (7, 0.0, 7), (7, 1.0, 0), (0, 0.5, 0), (1, 0.49, 1)],
)
def test_keep_count_rounds_the_pruned_half_up(size, sparsity, keep):
    assert keep_count(size, sparsity) == keep


def test_defaults():
    config = PruneConfig()
    assert (config.metric, config.sparsity, config.group, config.order) == ("wanda", 0.5, "row", "sequential")


def test_skip_may_be_one_pattern_or_none():
    assert PruneConfig(skip="q_proj").skip == ("q_proj",)
    assert PruneConfig(skip=None).skip == ()


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
        ({"sparsity": True}, r"sparsity must be .* \(got True\)"),
        ({"sparsity": "half"}, r"sparsity must be .* \(got half\)"),
        ({"pattern": (2, 4)}, r"pattern must be N:M, .*\(got \(2, 4\)\); e.g. \"2:4\""),
        ({"pattern": 24}, r"pattern must be N:M, .*\(got 24\)"),
        ({"skip": 3}, r"skip must be regular expressions \(got 3\)"),
        ({"batch_tokens": True}, r"batch_tokens must be a whole number .*\(got True\)"),
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
        ({"batch_tokens": 0}, r"batch_tokens must be a whole number of at least 1 \(got 0\)"),
        ({"refine": "greedy"}, r"refine must be one of None, mean, swaps \(got 'greedy'\)"),
        ({"update": "gptq"}, r"update must be one of None, admm, mean, obs, tune, distill \(got 'gptq'\)"),
        ({"update": "obs", "gram": "cos"}, r"gram must be one of plain, cosine"),
        ({"gram": "cosine"}, r"gram cosine is how refine or update measure errors"),
        ({"gram": "sketch"}, r"gram sketch is how refine or update measure errors"),
        (
            {"gram": "sketch", "refine": "swaps"},
            r"gram sketch serves admm, not swaps, which reads a whole one",
        ),
        ({"update": "admm", "damping": -0.1}, r"damping must be .* 0 or more \(got -0.1\)"),
        ({"update": "admm", "damping": float("inf")}, r"damping must be .* \(got inf\)"),
        ({"damping": 0.1}, r"damping needs update admm or obs"),
        ({"refine": "swaps", "damping": 0.1}, r"damping needs update admm or obs"),
        ({"iterations": 0}, r"iterations must be a whole number of at least 1"),
        ({"iterations": 1.5}, r"iterations must be a whole number of at least 1 \(got 1.5\)"),
        ({"saliency": "loss"}, r"saliency must be one of magnitude, obs"),
        ({"max_swaps": 0}, r"max_swaps must be a whole number of at least 1"),
        ({"refine": "swaps", "group": "matrix"}, r"swaps compares within rows .*'matrix'"),
        ({"update": "admm", "group": "matrix"}, r"admm compares within rows .*'matrix'"),
        ({"refine": "swaps", "update": "obs", "group": "matrix"}, r"swaps\+obs compares within rows .*'matrix'"),
        ({"refine": "swaps", "group": "model"}, r"swaps compares within rows .*'model'"),
        ({"update": "obs", "group": "model"}, r"obs compares within rows .*'model'"),
        ({"tune_epochs": -1}, r"tune_epochs must be a whole number of at least 0"),
        ({"tune_lr": 0.0}, r"tune_lr must be more than 0"),
        ({"tune_lr": float("nan")}, r"tune_lr must be more than 0 \(got nan\)"),
        ({"tune_epochs": 1, "group": "model"}, r"update tune trains block after block"),
        ({"allocation": "even"}, r"allocation must be one of uniform, owl, error"),
        ({"allocation": "owl", "allocation_range": 0.0}, r"allocation_range must be .* between 0 and 1 \(got 0.0\)"),
        ({"allocation": "owl", "pattern": "2:4"}, r"allocation owl cannot move weights between N:M groups"),
        ({"allocation": "error", "group": "model"}, r"group model itself allocates"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(**arguments)


def test_names_that_are_none():
    with pytest.raises(InputError, match=r"not both \(got update\)"):
        PruneConfig(solver=SolverConfig(), update="admm")
    with pytest.raises(TypeError, match=r"unexpected setting 'sparsty'; known are .*sparsity"):
        PruneConfig(sparsty=0.5)


@pytest.mark.parametrize(
    ("arguments", "solver", "damping"),
    [
        ({}, "", None),
        ({"refine": "swaps", "pattern": "2:4"}, "swaps", None),
        ({"update": "obs", "group": "matrix"}, "obs", 0.01),
        ({"update": "admm", "metric": lambda weight, stats: weight.abs()}, "admm", 0.1),
        ({"refine": "swaps", "update": "admm", "damping": 0.0}, "swaps+admm", 0.0),
    ],
)
def test_solvers_and_their_damping(arguments, solver, damping):
    config = PruneConfig(**arguments)
    assert (config.solver.name, config.to_dict()["damping"]) == (solver, damping)


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        ({"metric": "wanda"}, {INPUT}),
        ({"metric": "wanda", "update": "admm"}, {INPUT, GRAM}),
        ({"update": "admm", "gram": "sketch"}, {INPUT, SKETCH}),
        ({"metric": "cosvar", "refine": "swaps", "gram": "cosine"}, {WEIGHTED, COSINE_GRAM}),
    ],
)
def test_only_solvers_need_a_gram_matrix(arguments, needs):
    assert PruneConfig(**arguments).needs.prune == needs


def test_a_metrics_old_name_warns():
    with pytest.warns(DeprecationWarning, match=r"'cosp\+varp' is now called 'ace'"):
        config = PruneConfig("cosp+varp")
    assert config == PruneConfig("ace")


def test_to_dict_holds_every_setting():
    assert set(PruneConfig().to_dict()) == set(all_settings())
