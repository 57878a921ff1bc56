import json
import subprocess
import sys
import tempfile

from tiny_models import make_model, make_tokens

from ace_ext import PruneConfig, prune_model
from ace_ext.models.versions import versions
from ace_ext.records import BlockReport, MatrixReport, PruneReport, Solution, Tuning


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
    report.blocks[1].tuning = Tuning(0.5, 0.25)
    assert PruneReport.from_json(report.to_json()) == report


def test_table_averages_over_blocks():
    lines = make_report().table().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["up", "4x8", "0.5156", "0.1000", "0.9900"]
    assert lines[2] == "2 blocks, 2 matrices, sparsity 0.5156, 1.2 s, peak memory 1.00 GiB on cpu"


def test_rows_without_a_weight_are_told():
    report = make_report()
    assert "no weight is left" not in report.table()
    report.matrices[1].empty_rows = 3
    assert (
        "no weight is left in 3 rows of 1 matrices, 3 of 4 in layers.1.up: these outputs are constant" in report.table()
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
