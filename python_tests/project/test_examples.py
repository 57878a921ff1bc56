"""The scripts of ``examples/`` run unchanged, each as a separate process, on a tiny random model."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import save_dense, weights_bytes
from safetensors.torch import load_file

from ace_ext import PruneReport
from ace_ext.runs.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--nsamples", "4", "--seqlen", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the model ``dense``, ``text.txt`` to calibrate on, and ``other.txt`` to evaluate on."""
    folder = tmp_path_factory.mktemp("examples")
    save_dense(folder / "dense")
    (folder / "other.txt").write_text("over the lazy fox the quick brown dog jumps " * 40)
    return folder


def run_example(place: Path, name: str, *options: str) -> str:
    """The example's output. It runs in ``place``, outside the source tree, so that Python finds the installed
    package."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / name), "dense"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process more beside the tests'
    done = subprocess.run(
        [*command, "--text", "text.txt", *SMALL, *options],
        capture_output=True,
        text=True,
        cwd=place,
        env=one_thread,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def zeros(folder: Path) -> float:
    """Share of zeros in the matrices of the blocks."""
    weights = [
        value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
        if ".layers." in name and value.dim() == 2
    ]
    assert len(weights) == 21
    return float(sum((w == 0).sum() for w in weights) / sum(w.numel() for w in weights))


def test_prune_from_python(place):
    printed = run_example(place, "prune_from_python.py", "--output", "pruned")
    assert "3 blocks, 21 matrices, sparsity 0.5000" in printed
    assert "largest relative error: " in printed
    assert zeros(place / "pruned") == 0.5
    assert verify(place / "pruned").problems == []


def test_own_metric(place):
    lines = run_example(place, "own_metric.py").splitlines()
    assert [line.split()[0] for line in lines] == ["wanda", "root_wanda"]
    errors = [float(line.split()[-1]) for line in lines]
    assert all(0 < error < 1 for error in errors)
    assert errors[0] != errors[1]  # another mask


def test_reprune_from_statistics(place):
    run_example(place, "reprune_from_statistics.py", "--output", "again")
    pruned = {name: place / "again" / name for name in ("sparsity-0.5", "sparsity-0.6", "pattern-2-4")}
    assert (place / "again" / "statistics.zip").is_file()
    assert zeros(pruned["sparsity-0.5"]) == 0.5
    assert zeros(pruned["sparsity-0.6"]) == pytest.approx(0.6, abs=0.02)  # whole weights of rows of 32 and 48
    assert zeros(pruned["pattern-2-4"]) == 0.5
    assert weights_bytes(pruned["pattern-2-4"]) != weights_bytes(pruned["sparsity-0.5"])
    report = PruneReport.from_json((pruned["sparsity-0.6"] / "ace_report.json").read_text())
    assert report.extra["statistics"] == "of the dense model, from a file"


def test_compare_methods(place):
    printed = run_example(place, "compare_methods.py", "--held-out", "other.txt", "--eval-seqlen", "32")
    *table, lowest = printed.splitlines()
    assert [sum(method in line for line in table) for method in ("wanda ", "ace ")] == [2, 2]
    assert lowest.startswith("lowest: ")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_run(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name} MODEL" in ast.get_docstring(ast.parse(text))
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
    assert f"test_{path.stem}" in globals(), f"no test runs {path.name}"
