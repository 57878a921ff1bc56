"""Prints how large the package is: lines, imported files, options, words of the README.

    python tools/counts.py

Lines and words are those of this checkout; imports and options are those of the installed ace_ext. No test asserts a
number.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from make_synthetic_llama import make

ROOT = Path(__file__).resolve().parents[1]

IMPORTED = """
import sys

def count():
    own = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "ace_ext"]
    return sum(file.endswith(".py") for file in own)

import ace_ext.runs.pipeline
first = count()
from ace_ext.__main__ import main
main()
print(first, count())
"""
"""Prints how many files of ace_ext the pipeline of a run imports, and how many a whole command line."""


def printed(folder: Path, *arguments: object) -> str:
    """What Python prints in a process of its own, started in a folder where it finds the installed ace_ext."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def imported_files(folder: Path) -> tuple[int, int]:
    """How many files ``ace_ext.runs.pipeline`` imports, and how many are imported after ``ace-prune run`` on a model of
    one block with default options."""
    make(folder / "model", layers=1, hidden=128, intermediate=256)
    options = ["--model", "model", "--output", "out", "--calibration", "model/text.txt"]
    options += ["--nsamples", 4, "--seqlen", 16, "--device", "cpu", "--quiet"]
    pipeline, run = printed(folder, "-c", IMPORTED, "run", *options).split()[-2:]
    return int(pipeline), int(run)


def main() -> None:
    sources = sorted((ROOT / "ace_ext").rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources)
    with tempfile.TemporaryDirectory() as name:
        text = printed(Path(name), "-m", "ace_ext", "run", "--help")
        pipeline, run = imported_files(Path(name))
    flags = re.findall(r"^  (?:-\w, )?--[\w-]+", text, re.MULTILINE)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    print(f"ace_ext: {lines:,} lines in {len(sources)} files")
    print(f"ace_ext.runs.pipeline imports {pipeline} of them, ace-prune run {run}")
    print(f"ace-prune run --help: {len(text.splitlines())} lines of 80 columns, {len(flags)} flags")
    print(f"README: {len(words):,} words")


if __name__ == "__main__":
    main()
