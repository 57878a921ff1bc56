"""``tools/counts.py`` counts this checkout. What it counts is not asserted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "counts.py"


@pytest.mark.nightly
def test_every_count_is_printed(tmp_path):
    done = subprocess.run([sys.executable, TOOL], cwd=tmp_path, capture_output=True, text=True, check=True)
    names = ("ace_ext", "ace_ext.runs.pipeline imports", "ace-prune run --help", "README")
    lines = done.stdout.splitlines()
    assert [line.startswith(name) for line, name in zip(lines, names, strict=True)] == [True] * 4
    for line in lines:
        counts = [int(count.replace(",", "")) for count in re.findall(r"\d[\d,]*", line)]
        assert counts
        assert min(counts) > 0
