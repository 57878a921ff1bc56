import json
import subprocess
import sys
import tempfile

import pytest
from tiny_models import make_model, make_tokens

from ace_ext import PruneConfig, prune_model
from ace_ext.models.versions import versions
from ace_ext.records import BlockReport, HeldOutPerplexity, MatrixReport, PruneReport, Solution, Tuning


def make_report() -> PruneReport:
    blocks = [
        BlockReport(f"layers.{i}", 0.5, [MatrixReport(f"layers.{i}.up", (4, 8), 16, 16 - i, 96, 0.1, 0.99)])
        for i in range(2)
    ]
    return PruneReport({"method": "ace"}, "cpu", "bfloat16", blocks, 1.25, 2**30, {"torch": "2"}, {"seed": 0})


def test_json_keeps_everything():
    report = make_report()
    assert PruneReport.from_json(report.to_json()) == report
    data = json.loads(report.to_json())
    assert data["sparsity"] == 1 - 31 / 64
    assert data["blocks"][1]["matrices"][0]["sparsity"] == 1 - 15 / 32


def test_json_keeps_a_solution():
    report = make_report()
    report.matrices[0].solution = Solution("swaps+admm", 0.1, 1, 0.5, 0.25)
    assert PruneReport.from_json(report.to_json()) == report
    assert report.matrices[1].solution is None


def test_json_keeps_a_tuning():
    report = make_report()
    report.blocks[1].tuning = Tuning(0.5, 0.25, 2)
    assert PruneReport.from_json(report.to_json()) == report


def test_table_averages_over_blocks():
    lines = make_report().table().splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["up", "4x8", "0.5156", "0.1000", "0.9900"]
    assert lines[2] == "2 blocks, 2 matrices, sparsity 0.5156, 1.2 s, peak memory 1.00 GiB on cpu"
    assert lines[3] == "method ace"


def test_table_names_the_method_as_it_was_asked_for():
    report = make_report()
    report.config = {"method": "admm(damping=0.2)", "preset": None}
    assert report.table().splitlines()[3] == "method admm(damping=0.2)"
    report.config = {"method": "admm", "preset": "balanced"}
    assert report.table().splitlines()[3] == "method balanced: admm"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"sparsity": 0.7, "group": "row"}, "sparsity is 0.6875, not 0.7: each row loses a whole number of weights"),
        ({"sparsity": 0.7, "group": "matrix"}, "sparsity is 0.6875, not 0.7: each matrix loses a whole number"),
        ({"sparsity": 0.6875, "group": "row"}, None),
        ({"sparsity": 0.8, "group": "row"}, None),  # rounding alone would explain 0.77 to 0.83
        ({"sparsity": 0.7, "group": "row", "pattern": "2:4"}, None),
        ({"sparsity": 0.7, "group": "model"}, None),
    ],
)
def test_table_explains_a_sparsity_that_was_rounded(config, line):
    report = make_report()
    report.config = config
    for matrix in report.matrices:
        matrix.shape, matrix.keep = ((4, 16), 20) if config["group"] == "row" else ((1, 16), 5)
    assert (line or "whole number") in report.table() if line else "whole number" not in report.table()


def test_zeros_of_the_dense_weights_are_not_rounding():
    report = make_report()
    report.config = {"sparsity": 0.0, "group": "row"}
    for matrix in report.matrices:
        matrix.shape, matrix.keep, matrix.nonzero = (4, 16), 64, 63
    assert report.sparsity == pytest.approx(1 / 64)
    assert "whole number" not in report.table()


def test_table_says_what_training_of_blocks_gained():
    report = make_report()
    assert "trained" not in report.table()
    report.blocks = [
        BlockReport("a", 1.0, tuning=Tuning(0.5, 0.25, 3)),
        BlockReport("b", 1.0, tuning=Tuning(0.25, 0.25, 0)),
    ]
    line = "trained: mean loss of a block 0.3750 before, 0.2500 after; 1 of 2 blocks did not improve and stayed"
    assert line in report.table()


@pytest.mark.parametrize(
    ("method", "calibration", "expected"),
    [
        ("admm(gram=sketch)", {"source": "self"}, "--method balanced or best, --calibration with text like that of"),
        ("wanda", {"source": "bundled"}, "--method balanced or best, --calibration with text like that of"),
        (
            "wanda",
            {"source": "x.txt", "nsamples": 128, "seqlen": 128},
            "--method balanced or best, more text, e.g. --ns",
        ),
        ("admm", {"source": "x.txt", "nsamples": 128, "seqlen": 2048}, "--method better or best, a lower --sparsity"),
        (
            "admm + train",
            {"source": "x.txt", "nsamples": 128, "seqlen": 2048},
            "--method better or best, a lower --sparsity",
        ),
        ("admm + distill", {}, 'a longer distillation, e.g. --method "best(tokens=262144)", a lower --sparsity'),
    ],
)
def test_a_large_loss_is_told_with_what_to_try(method, calibration, expected):
    report = make_report()
    report.config, report.extra = {"method": method}, {"calibration": calibration}
    report.perplexity = HeldOutPerplexity("text", 4, 128, 20.0, 30.0)
    assert report.advice().startswith("large loss: perplexity is 1.5 times the dense model's; try ")
    assert expected in report.advice()
    assert report.table().endswith(report.advice())


@pytest.mark.parametrize(
    ("dense", "pruned", "healed", "told"),
    [
        (20.0, 29.9, None, False),
        (20.0, 60.0, 29.0, False),  # the distilled model is what was written
        (20.0, 60.0, 31.0, True),
        (20.0, None, None, True),
        (None, 60.0, None, False),
    ],
)
def test_when_a_loss_is_large(dense, pruned, healed, told):
    report = make_report()
    report.perplexity = HeldOutPerplexity("text", 4, 128, dense, pruned, healed)
    assert bool(report.advice()) is told


def test_rows_without_a_weight_are_told():
    report = make_report()
    assert "no weight is left" not in report.table()
    report.matrices[1].empty_rows = 3
    assert (
        "no weight is left in 3 rows of 1 matrix, 3 of 4 in layers.1.up: these outputs are constant" in report.table()
    )


def test_rows_without_a_weight_are_counted():
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig("magnitude", sparsity=0.99))
    for matrix in report.matrices:
        assert matrix.empty_rows == int((model.get_submodule(matrix.name).weight == 0).all(1).sum())
    assert sum(matrix.empty_rows for matrix in report.matrices) > 0
    assert "no weight is left in" in report.table()
    report = prune_model(make_model("llama"), make_tokens(), PruneConfig("wanda"))
    assert sum(matrix.empty_rows for matrix in report.matrices) == 0


def test_an_empty_report_has_no_sparsity():
    assert PruneReport({}, "cpu", "float32").sparsity == 0.0


def test_peak_memory_sees_an_allocation():
    """In a separate process: the peak of this one may already be higher."""
    program = """
import torch
from ace_ext.process_memory import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = torch.ones(2**30, dtype=torch.uint8)
print(peak_memory_bytes(torch.device("cpu")) - before)
"""
    command = [sys.executable, "-c", program]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()).stdout)
    assert 2**29 < grown < 2**30 * 1.1  # the peak before, during the imports, may have been well above what is left


def test_versions_name_what_matters():
    assert {"ace_ext", "torch", "transformers", "python", "compiler"} == set(versions())
