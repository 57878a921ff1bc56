"""A valid folder passes; every kind of damage is reported."""

import pytest
from folders import prune, save_dense
from safetensors.torch import load_file, save_file

from ace_ext import InputError
from ace_ext.runs.verify import verify

UP = "model.layers.0.mlp.up_proj.weight"


def write(path, **config):
    return prune(save_dense(path.parent / "dense"), path, **config)[1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pattern": "2:4"},
        {"group": "matrix"},
        {"group": "model"},
        {"allocation": "error"},
        {"sparsity": 0.0},
        {"sparsity": 0.9},
    ],
    ids=str,
)
def test_sound_folders(tmp_path, config):
    result = verify(write(tmp_path / "out", **config))
    assert not result.problems
    assert result.loads
    assert result.matrices == 21
    assert result.exact_rows == result.rows


def _put(value):
    def damage(weight):
        row = weight[0]
        row[(row == 0).nonzero()[0]] = value

    return damage


@pytest.mark.parametrize(
    ("config", "damage", "message"),
    [
        ({}, _put(1.0), "1 of 48 rows keep more than 16"),
        ({}, _put(-0.0), "holds -0.0"),
        ({}, _put(float("nan")), "holds NaN or infinity"),
        ({}, lambda w: w[0].zero_(), "non-zeros, but the report says"),
        ({"pattern": "2:4"}, _put(1.0), "1 of 384 groups of 4 keep more than 2"),
        ({"group": "matrix"}, _put(1.0), "769 non-zeros, more than the 768 to keep"),
        ({"group": "model"}, _put(1.0), "non-zeros, more than the"),
    ],
    ids=["row", "minus-zero", "nan", "too-few", "pattern", "matrix", "model"],
)
def test_damage_is_found(tmp_path, config, damage, message):
    out = write(tmp_path / "out", **config)
    tensors = load_file(out / "model.safetensors")
    damage(tensors[UP])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    problems = "\n".join(verify(out).problems)
    assert message in problems


def test_missing_pieces(tmp_path):
    out = write(tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    del tensors[UP]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"has no tensor {UP}"):
        verify(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no safetensors"):
        verify(out)


def test_a_folder_that_does_not_load(tmp_path):
    out = write(tmp_path / "out")
    (out / "config.json").write_text('{"model_type": "nothing"}')
    result = verify(out)
    assert not result.loads
    assert any("could not be loaded" in problem for problem in result.problems)
