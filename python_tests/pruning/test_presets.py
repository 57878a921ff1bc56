import pytest
import torch
from tiny_models import make_model

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.pruning.presets import PRESETS, PUBLISHED, preset_config


@pytest.mark.parametrize("name", PRESETS | PUBLISHED)
@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_presets_are_valid_whatever_is_pruned(name, settings):
    config = preset_config(name, **settings)
    assert config.sparsity == settings.get("sparsity", 0.5)
    assert config.group == ("matrix" if name == "published-sparsegpt" and "pattern" not in settings else "row")


def test_names_are_unique():
    assert not PRESETS.keys() & PUBLISHED.keys()


def test_the_quickest_is_what_prunes_by_default():
    report = prune_model(make_model("llama"), torch.randint(0, 64, (2, 16)))
    assert report.config == preset_config("fast").to_dict()


def test_settings_win():
    assert preset_config("best", distill_tokens=2, order="block") == PruneConfig(
        update="admm+distill", distill_tokens=2, order="block"
    )


def test_options_go_with_their_solver():
    assert preset_config("fast", update="mean") == PruneConfig(update="mean", gram="sketch")
    assert preset_config("fast", update="tune").solver.options == {"iterations": 10, "damping": 1.0}


def test_unknown_names_are_told():
    with pytest.raises(InputError, match=r"preset must be one of fast, balanced, best, published-wanda.*'turbo'"):
        preset_config("turbo")
