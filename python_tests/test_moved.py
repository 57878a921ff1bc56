"""What users of 0.1 wrote still works: import paths, settings and names of metrics in the ops."""

import importlib
import sys
import warnings

import pytest
import torch

from ace_ext import PruneConfig, ops
from ace_ext._moved import MOVED


@pytest.fixture(autouse=True)
def forget():
    """Removes the modules, so that each test imports them again and sees the warning."""
    yield
    for old in MOVED:
        sys.modules.pop(f"ace_ext.{old}", None)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_with_the_new_one(old):
    with pytest.warns(DeprecationWarning, match=rf"ace_ext\.{old} moved: import from ace_ext\.{MOVED[old][0]}"):
        importlib.import_module(f"ace_ext.{old}")
    for new in MOVED[old]:
        importlib.import_module(f"ace_ext.{new}")


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("calibration", "load_windows"),
        ("calibration", "evaluation_tokens"),
        ("calibration", "tokens_sha256"),
        ("statistics", "LinearStatistics"),
        ("reference", "score"),
        ("scores", "METRICS"),
        ("config", "PruneConfig"),
        ("report", "PruneReport"),
        ("evaluate", "perplexity"),
        ("checkpoint", "load_model"),
        ("checkpoint", "read_report"),
        ("pipeline", "prune_folder"),
        ("options", "RunOptions"),
        ("solvers", "prune_linear_"),
        ("verify", "verify"),
    ],
)
def test_names_are_found_under_their_old_path(old, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"ace_ext.{old}")
    assert getattr(module, name).__name__ == name if name != "METRICS" else module.METRICS


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.warns(DeprecationWarning, match="moved"):
        module = importlib.import_module("ace_ext.statistics")
    with pytest.raises(AttributeError, match=r"module 'ace_ext\.statistics' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_epochs_alone_still_train():
    with pytest.warns(DeprecationWarning, match="update='tune'"):
        config = PruneConfig(update="admm", tune_epochs=2)
    assert config == PruneConfig(update="admm+tune", tune_epochs=2)


def test_no_epoch_is_no_training():
    assert PruneConfig(update="admm+tune", tune_epochs=0).solver.block_solver is None


def test_settings_of_solvers_are_taken_by_name():
    config = PruneConfig("wanda", 0.6, update="admm", damping=0.05, iterations=7, saliency="magnitude")
    assert config.solver.name == "admm"
    assert config.to_dict()["iterations"] == 7
    with pytest.raises(TypeError, match="unexpected setting 'colour'"):
        PruneConfig(colour="red")


def test_ops_take_the_name_of_a_metric():
    weight, column = torch.randn(3, 8), torch.rand(8)
    expected = ops.score(weight, "scaled", column)
    with pytest.warns(DeprecationWarning, match="scaled"):
        assert torch.equal(ops.score(weight, "wanda", column), expected)
