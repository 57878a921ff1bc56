"""The notebook of ``examples/``: its cells run in order on a tiny random model, and it is saved without outputs."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import save_dense

from ace_ext.cards import card_says
from ace_ext.packed.files import is_packed

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_hour.ipynb"
SMALL = {"MODEL": "dense", "TEXT": "text.txt", "NSAMPLES, SEQLEN": (4, 16)}
"""What the test puts in place of the values of the first cell."""


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def script() -> str:
    """All code, with a small model and text in its first cell."""
    first, *rest = ("".join(cell["source"]) for cell in cells("code"))
    named = [ast.unparse(node.targets[0]).strip("()") for node in ast.parse(first).body]
    assert named == list(SMALL)
    return "\n\n".join(["\n".join(f"{name} = {value!r}" for name, value in SMALL.items()), *rest])


def test_every_cell_runs(script, tmp_path):
    save_dense(tmp_path / "dense")
    (tmp_path / "cells.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "cells.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 blocks, 21 matrices, sparsity 0.5000" in done.stdout
    assert "\nsound\n" in done.stdout
    difference = float(done.stdout.partition("largest difference of a logit: ")[2].split()[0])
    assert difference < 0.1  # logits of a few units, in bfloat16
    assert card_says(tmp_path / "pruned") == (21, 0.5)
    assert is_packed(tmp_path / "packed")


def test_it_is_a_notebook_without_outputs():
    whole = json.loads(NOTEBOOK.read_text())
    assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert "test_notebook.py" in "".join(cells("markdown")[0]["source"])
    assert f"`{NOTEBOOK.name}`" in NOTEBOOK.with_name("README.md").read_text()
