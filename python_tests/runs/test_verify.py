"""A valid folder passes; every kind of damage is reported."""

import json
import shutil

import pytest
import torch
from folders import call, prune, save_dense
from safetensors.torch import load_file, save_file

from ace_ext.cli.main import main
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
        {"method": "allocate + wanda"},
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


QUANTIZED = [
    {"method": "wanda + quantize(bits=4, group=64)"},
    {"method": "quantize(bits=8)"},
    {"method": "admm + quantize(bits=3)", "pattern": "2:4"},
]


@pytest.mark.parametrize("config", QUANTIZED, ids=str)
def test_kept_weights_that_are_rounded_to_zero_are_no_fault(tmp_path, config):
    """A row then has fewer weights than were to be kept, never more."""
    report, out = prune(save_dense(tmp_path / "dense"), tmp_path / "out", **config)
    result = verify(out)
    assert not result.problems
    assert result.loads
    assert result.exact_rows < result.rows
    assert all(matrix.nonzero <= matrix.keep for matrix in report.matrices)
    assert sum(matrix.nonzero for matrix in report.matrices) < sum(matrix.keep for matrix in report.matrices)
    assert "kept weights are 0" in report.table()
    assert ("sparsity 0.0" in report.table()) == (config["method"] == "quantize(bits=8)")


def test_the_grid_that_was_checked_is_named(tmp_path, capsys):
    out = write(tmp_path / "out", method="wanda + quantize(bits=4, group=64)")
    assert main(["verify", str(out)]) == 0
    assert "OK: counts, zeros, finite values, grid of 4 bits in groups of 64, loading" in capsys.readouterr().out
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grid"] == "4 bits in groups of 64"
    assert main(["verify", str(write(tmp_path / "plain"))]) == 0
    assert "grid" not in capsys.readouterr().out


@pytest.mark.parametrize("config", QUANTIZED, ids=str)
def test_a_weight_off_the_grid_is_found(tmp_path, config):
    out = write(tmp_path / "out", **config)
    tensors = load_file(out / "model.safetensors")
    row = tensors[UP][5]
    place = row.abs().argmax()
    row[place] *= 1.37
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert any(f"{UP.removesuffix('.weight')}: not on the grid of" in problem for problem in verify(out).problems)


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


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    place = tmp_path_factory.mktemp("sound")
    return write(place / "out")


@pytest.fixture
def out(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "out")


def edit_report(out, change):
    data = json.loads((out / "ace_report.json").read_text())
    change(data)
    (out / "ace_report.json").write_text(json.dumps(data))


def drop(name):
    def change(out):
        tensors = {n: t for n, t in load_file(out / "model.safetensors").items() if not n.startswith(name)}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return change


def put(name, value):
    def change(out):
        tensors = load_file(out / "model.safetensors")
        tensors[name] = value(tensors[name])
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return change


def configure(**values):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | values))

    return change


def report(change):
    return lambda out: edit_report(out, change)


DENSE_UP = lambda w: torch.ones_like(w)  # noqa: E731


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (report(lambda r: r.update(blocks=[])), "model.layers.0.self_attn.q_proj: not in the report"),
        (report(lambda r: r["blocks"].pop(1)), "model.layers.1.self_attn.q_proj: not in the report"),
        (report(lambda r: r["blocks"][0]["matrices"].pop(0)), "model.layers.0.self_attn.q_proj: not in the report"),
        (report(lambda r: r["blocks"][0]["matrices"][0].update(name="lm_head")), "lm_head: in the report, but no"),
        (report(lambda r: r["blocks"][0]["matrices"][0].update(shape=[1, 2])), "but the report says [1, 2]"),
        (report(lambda r: r["config"].update(sparsity=0.75)), "rows keep more than 8"),
        (report(lambda r: r["config"].update(skip=["q_proj"])), "q_proj: in the report, but not a matrix that the run"),
        (report(lambda r: r["config"].update(pattern="2:4", sparsity=0.5)), "groups of 4 keep more than 2"),
        (report(lambda r: r["config"].update(pattern="2:5")), "not in whole groups of 5"),
        (drop("model.embed_tokens"), "model.embed_tokens.weight: missing"),
        (drop("model.norm"), "model.norm.weight: missing"),
        (drop(UP), f"{UP}: missing"),
        (drop("model.layers.1."), "model.layers.1.self_attn.q_proj.weight: missing"),
        (put("model.norm.weight", lambda w: w * float("nan")), "model.norm.weight: holds NaN or infinity"),
        (
            put("model.norm.weight", lambda w: w[:-1].clone()),
            "model.norm.weight: shape [31], but config.json says [32]",
        ),
        (put(UP, lambda w: w[:-1].clone()), "[47, 32], but it should be [48, 32]"),
        (put(UP, DENSE_UP), "48 of 48 rows keep more than 16"),
        (configure(num_hidden_layers=2), "model.layers.2.self_attn.q_proj.weight: not in the model"),
        (configure(num_hidden_layers=4), "model.layers.3.self_attn.q_proj.weight: missing"),
        (configure(hidden_size=64), "but config.json says"),
        (configure(vocab_size=60), "model.embed_tokens.weight: shape [64, 32], but config.json says [60, 32]"),
        (configure(num_hidden_layers=None), "could not be"),
        (configure(model_type="bert"), "not in the report"),
        (lambda out: (out / "config.json").write_text("null"), "could not be"),
        (lambda out: (out / "tokenizer.json").write_text("{}"), "could not be loaded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_should_be_there_follows_from_the_configuration(change, message, out, capsys):
    change(out)
    status, printed, error = call(capsys, "verify", out)
    assert status == 1, error
    assert error == ""
    assert message in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "ace_report.json").write_text("[" * 100000), "is not a report"),
        (lambda out: (out / "ace_report.json").write_bytes(b"\xff"), "is not a report"),
        (lambda out: (out / "ace_report.json").write_text("null"), "is not a report"),
        (report(lambda r: r.update(config=None)), "is not a report"),
        (report(lambda r: r["config"].update(sparsity="x")), "is not a report"),
        (report(lambda r: r["config"].update(group="cells")), "is not a report"),
        (report(lambda r: r["config"].update(skip=5)), "is not a report"),
        (report(lambda r: r["config"].pop("pattern")), "is not a report"),
        (report(lambda r: r["blocks"][0]["matrices"][0].update(name=5)), "is not a report"),
        (report(lambda r: r["blocks"][0]["matrices"][0].update(shape="ab")), "is not a report"),
        (report(lambda r: r["blocks"][0]["matrices"][0].update(nonzero="many")), "is not a report"),
        (report(lambda r: r["blocks"][0].update(matrices=None)), "is not a report"),
        (lambda out: (out / "model.safetensors").unlink(), "has no safetensors"),
        (lambda out: (out / "model.safetensors").write_bytes(b"short"), "is not a complete safetensors file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_folders_that_cannot_be_checked(change, message, out, capsys):
    change(out)
    status, printed, error = call(capsys, "verify", out)
    assert status == 2, printed
    assert printed == ""
    assert error.count("\n") == 1
    assert message in error


def test_skipped_matrices_stay_dense(tmp_path):
    assert not verify(write(tmp_path / "out", skip=["q_proj", r"layers\.1\."])).problems


def test_a_folder_that_does_not_load(tmp_path):
    out = write(tmp_path / "out")
    (out / "config.json").write_text('{"model_type": "nothing"}')
    result = verify(out)
    assert not result.loads
    assert any("could not be loaded" in problem for problem in result.problems)
