"""``ace-prune heal`` and the stage ``distill`` over quantized models on files: the grid is kept, resumed runs write the
same bytes, a folder that left its grid is refused."""

import random
from dataclasses import replace

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from helpers import rest_nightly
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.grids import Grid
from ace_ext.healing import HealSettings
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.runs import heal_journal
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_memory import Division, HealDemand
from ace_ext.runs.heal_request import HealOptions, HealRequest
from ace_ext.runs.heal_text import recorded_text
from ace_ext.runs.output import read_report
from ace_ext.runs.verify import verify

SETTINGS = HealSettings(learning_rate=0.01, step_tokens=64, held_out=4)
METHOD = "wanda + quantize(bits=4, group=64)"
GRID = Grid(4, 64)
EIGHT_BITS = "wanda + quantize(bits=8, group=64)"
DISTILLED = f"{EIGHT_BITS} + distill(tokens=3072, learning_rate=0.01)"
"""In three steps. With fewer bits these would not reach the next point of the grid, or all would at once."""
MANY = {"nsamples": 64}


def make_quantized(place, family="llama", method=METHOD):
    """``place/dense`` and ``place/pruned``, and the text that the latter was calibrated on."""
    dense = save_dense(place / "dense", family)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    (place / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=4000)))
    prune(dense, place / "pruned", method=method)
    return place / "pruned"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    make_quantized(folder)
    return folder


def request(folder, output, **options):
    options.setdefault("tokens", 1024)
    text = recorded_text(read_report(folder))
    return HealRequest(str(folder), output, text, None, SETTINGS, HealOptions(**options), torch.device("cpu"))


def matrices(folder):
    blocks = find_blocks(load_model(str(folder)).model)
    return {block.full_name(child): linear.weight for block in blocks for child, linear in block.linears.items()}


def check_grid(before, after, grid=GRID):
    """Zeros and scales of each matrix are those of before; returns how many weights have changed."""
    old, new, changed = matrices(before), matrices(after), 0
    for name, was in old.items():
        scales = grid.recover(was).scales
        assert torch.equal(was == 0, new[name] == 0)
        assert torch.equal(grid.dequantize(grid.nearest(new[name], scales), scales), new[name])
        changed += int((was != new[name]).sum())
    return changed


@pytest.mark.parametrize("family", rest_nightly(["mixtral"], ["llama", "opt", "mixtral"]))
def test_output(family, tmp_path):
    pruned = make_quantized(tmp_path, family)
    report, path = heal_folder(request(pruned, tmp_path / "healed"))
    assert report.healing.loss_after < report.healing.loss_before
    assert verify(path).problems == verify(pruned).problems == []
    assert check_grid(pruned, path)
    again, twice = heal_folder(request(path, tmp_path / "twice"))
    assert again.healing.loss_before == report.healing.loss_after
    check_grid(path, twice)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths(bits, tmp_path):
    pruned = make_quantized(tmp_path, method=f"admm + quantize(bits={bits})")
    report, path = heal_folder(request(pruned, tmp_path / "healed"))
    assert report.healing.loss_after <= report.healing.loss_before
    assert verify(path).problems == []
    check_grid(pruned, path, Grid(bits, 128))


def stop_at(step, monkeypatch):
    """Ends a run with an error of the disk once a number of steps are done and saved."""
    monkeypatch.setattr(heal_journal, "SAVE_SECONDS", 0)
    monkeypatch.setattr(heal_journal, "SAVE_SHARE", 0)
    save = heal_journal.HealJournal.save

    def stopping(journal, tensors=()):
        save(journal, tensors)
        if journal.notes.get("step") == step:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(heal_journal.HealJournal, "save", stopping)


@pytest.mark.parametrize("after", rest_nightly([16], [1, 7, 16]))
@pytest.mark.parametrize("parts", [1, 3])
def test_a_resumed_run_writes_the_same_bytes(after, parts, place, tmp_path, monkeypatch):
    monkeypatch.setattr(HealDemand, "divide", lambda demand, *_: (Division(parts), demand.peak(Division(parts), 0)))
    whole = heal_folder(request(place / "pruned", tmp_path / "whole"))[1]
    with monkeypatch.context() as patch:
        stop_at(after, patch)
        with pytest.raises(InputError, match="No space left on device"):
            heal_folder(request(place / "pruned", tmp_path / "out"))
    resumed = heal_folder(request(place / "pruned", tmp_path / "out", resume=True))[1]
    assert weights_bytes(resumed) == weights_bytes(whole) != weights_bytes(place / "pruned")


def test_the_last_stage_of_a_run(place, tmp_path, monkeypatch):
    """Two runs as one, also when it is stopped; and the same figures in memory."""
    report, whole = prune(place / "dense", tmp_path / "whole", calibration=MANY, method=DISTILLED)
    assert report.config["method"] == str(PruneConfig(DISTILLED).method)
    assert report.healing.loss_after < report.healing.loss_before
    assert verify(whole).problems == []
    prune(place / "dense", tmp_path / "pruned", calibration=MANY, method=EIGHT_BITS)
    assert check_grid(tmp_path / "pruned", whole, Grid(8, 64))
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(InputError, match="No space left on device"):
            prune(place / "dense", tmp_path / "out", calibration=MANY, method=DISTILLED)
    _, out = prune(place / "dense", tmp_path / "out", {"resume": True}, MANY, method=DISTILLED)
    assert weights_bytes(out) == weights_bytes(whole)


def test_in_memory():
    model = make_model("llama", torch.bfloat16)
    report = prune_model(model, torch.randint(0, 64, (12, 16)), PruneConfig(DISTILLED))
    assert report.healing.zeros == sum(matrix.size - matrix.nonzero for matrix in report.matrices)
    for block in find_blocks(model):
        for child, linear in block.linears.items():
            assert Grid(8, 64).recover(linear.weight) is not None, child


def test_a_folder_that_left_its_grid_is_refused(tmp_path):
    pruned = make_quantized(tmp_path)
    tensors = load_file(pruned / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    place = tuple(weight.nonzero()[3].tolist())
    weight[place] *= 1.07
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    found = r"model\.layers\.1\.mlp\.up_proj: not on the grid of 4 bits in groups of 64"
    with pytest.raises(InputError, match=rf"has changed since ace-prune wrote it: {found}; "):
        heal_folder(request(pruned, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(verify(pruned).problems) == 1


@pytest.mark.parametrize("text", ["wanda + quantize(bits=5)", "wanda + quantize(nothing=3)", "wanda + quantize("])
def test_a_report_whose_grid_cannot_be_read(text, tmp_path):
    pruned = make_quantized(tmp_path)
    report = read_report(pruned)
    report.config["method"] = text
    (pruned / "ace_report.json").write_text(report.to_json())
    with pytest.raises(InputError, match=r"ace_report\.json names no grid that ace-prune knows: "):
        verify(pruned)
    with pytest.raises(InputError, match=r"ace_report\.json names no grid that ace-prune knows: "):
        heal_folder(request(pruned, tmp_path / "out"))


def test_the_estimate_counts_scales_and_temporaries():
    """Beside what training takes without a grid: a scale in two bytes for each 64 weights, and 24 bytes for each
    entry of the largest matrix, which is rounded whole."""
    model = make_model("llama", torch.bfloat16)
    blocks = find_blocks(model)
    sizes = [linear.weight.numel() for block in blocks for linear in block.linears.values()]
    with_it, without = (
        HealDemand.of(model, blocks, [torch.zeros(4, 16)], grid=grid)._training(Division()) for grid in (GRID, None)
    )
    assert with_it.training - without.training == sum(sizes) * 2 // 64 + 24 * max(sizes)
    assert replace(with_it, training=0) == replace(without, training=0)
