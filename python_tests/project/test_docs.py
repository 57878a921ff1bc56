"""README and the pages of ``docs/`` are correct: commands are accepted, examples run, names exist."""

import ast
import importlib
import re
import shlex
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from folders import save_dense

from ace_ext.cli.main import build_parser
from ace_ext.compare.journal import BlockFigures, Cell, Run
from ace_ext.data.perplexity import Perplexity
from ace_ext.pruning import kinds
from ace_ext.records import (
    BlockReport,
    CutBlock,
    DroppedBlock,
    GoneExperts,
    Healing,
    HeldOutPerplexity,
    MatrixReport,
    PruneReport,
    Removed,
    RoundedTable,
    Solution,
    TriedRemoval,
    Tuning,
)
from ace_ext.runs.verify import verify

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples/README.md"]
PAGES += [ROOT / "benchmarks/RESULTS.md"]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def code_blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks of the language; with "" also indented ones."""
    fenced = [match[2] for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if match[1] == language]
    if language:
        return fenced
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return fenced + re.findall(r"(?:^    .*\n)+", rest, re.M)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Arguments of each ``ace-prune`` command in the code blocks, also if started by ``-m ace_ext``."""
    found = []
    for block in code_blocks(text) + code_blocks(text, "bash") + code_blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (["ace-prune"], ["-m", "ace_ext"]):
                at = next((i for i in range(len(words)) if words[i : i + len(start)] == start), None)
                if at is not None:
                    found.append(words[at + len(start) :])
    return found


def test_commands_are_found():
    """Tests the search for commands: without it, a search that finds none would pass every test below."""
    text = "    A=1 ace-prune run --model M \\\n        --output D  # a remark\n\n    torchrun -m ace_ext verify D\n"
    assert commands(text) == [["run", "--model", "M", "--output", "D"], ["verify", "D"]]
    assert len(commands((ROOT / "README.md").read_text())) >= 6
    assert len(commands((ROOT / "docs/getting-started.md").read_text())) >= 9


def parse(arguments: list[str]) -> object:
    """0, or the status with which the parser ends the program."""
    try:
        build_parser().parse_args(arguments)
    except SystemExit as end:  # --help and --version end so too, with status 0
        return end.code
    return 0


@page
def test_parser_accepts_every_command(path, capsys):
    for arguments in commands(path.read_text()):
        assert parse(arguments) == 0, f"ace-prune {shlex.join(arguments)}: {capsys.readouterr().err}"


def comparisons(text: str) -> dict[str, list[dict]]:
    """The options of the comparisons of each code block, by their folder."""
    found: dict[str, list[dict]] = {}
    for number, block in enumerate(code_blocks(text)):
        for arguments in commands(f"```\n{block}\n```\n"):
            if arguments[0] == "compare" and "--output" in arguments:
                options = vars(build_parser().parse_args(arguments))
                found.setdefault(f"{options['output']} of block {number}", []).append(options)
    return found


@page
def test_comparisons_of_a_block_do_not_share_a_folder(path):
    """``compare`` refuses a folder of a comparison with other texts or tasks, so the second command would fail."""
    for place, settings in comparisons(path.read_text()).items():
        shared = [{name: options[name] for name in ("model", "texts", "tasks", "task_limit")} for options in settings]
        assert all(one == shared[0] for one in shared), place


def test_comparisons_are_found():
    assert comparisons((ROOT / "docs/getting-started.md").read_text())


OF_OTHERS = {"--no-build-isolation", "--nproc-per-node"} | {
    "--enforce-eager",
    "--load-format dummy",
    "--enable-eplb",
}
"""Options of pip and torchrun, and of vLLM."""


def known_options() -> set[str]:
    verbs = next(action.choices for action in build_parser()._actions if action.dest == "command")
    parsers = [build_parser(), *verbs.values()]
    return {option for parser in parsers for action in parser._actions for option in action.option_strings}


@page
def test_options_in_the_text_exist(path):
    """``--option value`` in running text and tables exists."""
    for code in inline_code(path.read_text()):
        if code.startswith(("--", "ace-prune ")) and code not in OF_OTHERS and not code.startswith("--8<--"):
            unknown = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) - known_options()
            assert not unknown, code


# --- Python -----------------------------------------------------------------------------------------------------------


@page
def test_python_blocks_parse(path):
    for block in code_blocks(path.read_text(), "python"):
        ast.parse(block)


def test_readme_example_runs(tmp_path, monkeypatch):
    """The README's example, with a local text instead of one that is fetched."""
    save_dense(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks((ROOT / "README.md").read_text(), "python")
    assert '"wiki-mini"' in block
    names: dict = {}
    exec(block.replace('"wiki-mini"', '"text.txt"').replace("nsamples=128, seqlen=128", "nsamples=8, seqlen=16"), names)
    assert names["report"].sparsity == 0.5
    assert verify(tmp_path / "pruned").problems == []


# --- names and files --------------------------------------------------------------------------------------------------


@page
def test_named_objects_exist(path):
    """``ace_ext.module.name`` in code. Pages of the documentation use no path that is deprecated."""
    for code in inline_code(path.read_text()):
        match = re.fullmatch(r"(ace_ext(?:\.\w+)+)(?:\(.*\))?", code)
        if match and not match[1].endswith((".py", ".md")):
            with warnings.catch_warnings():
                if path.parent.name == "docs":
                    warnings.simplefilter("error", DeprecationWarning)
                assert resolve(match[1]) is not None


def resolve(name: str) -> object:
    """The object of a dotted name. Raises ImportError or AttributeError if there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@page
def test_named_files_exist(path):
    """``folder/file.ext`` in code, for the folders of the repository."""
    folders = {child.name for child in ROOT.iterdir() if child.is_dir()} - {"build", "demo"}
    for code in inline_code(path.read_text()):
        for word in code.split():
            if word.split("/")[0] in folders and re.search(r"/\S*\.\w+$", word):
                assert (ROOT / word).exists(), code


@page
def test_paragraphs_have_no_accidental_numbered_lines(path):
    """A line of a paragraph that begins with "16." becomes an entry of a list. Lists begin with 1 and count up."""
    prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    expected = 1
    for line in prose.splitlines():
        found = re.match(r" {0,3}(\d+)[.)] ", line)
        if found:
            assert int(found[1]) in (1, expected), line
            expected = int(found[1]) + 1
        elif line.startswith("#"):
            expected = 1


@pytest.mark.parametrize(
    "record",
    [
        PruneReport,
        BlockReport,
        MatrixReport,
        Solution,
        Tuning,
        Removed,
        CutBlock,
        DroppedBlock,
        GoneExperts,
        TriedRemoval,
        RoundedTable,
        Healing,
        HeldOutPerplexity,
        Run,
        Cell,
        BlockFigures,
        Perplexity,
    ],
    ids=lambda record: record.__name__,
)
def test_file_formats_name_every_key(record):
    named = set(inline_code((ROOT / "docs/file-formats.md").read_text()))
    assert {field.name for field in fields(record)} <= named


def test_file_formats_name_every_kind_of_statistics():
    named = set(inline_code((ROOT / "docs/file-formats.md").read_text()))
    assert {kinds.INPUT, kinds.WEIGHTED, kinds.MOMENT, kinds.GRAM, kinds.COSINE_GRAM} <= named


# --- the package ------------------------------------------------------------------------------------------------------


def test_each_folder_of_modules_is_a_package():
    """setuptools finds packages by their ``__init__.py``: a folder without one would be missing from a wheel."""
    folders = {path.parent for path in (ROOT / "ace_ext").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
    assert (ROOT / "ace_ext/py.typed").is_file()


# --- CONTRIBUTING -----------------------------------------------------------------------------------------------------


def added_lines(path: str) -> list[str]:
    """What the diffs of CONTRIBUTING add to a file."""
    text = "\n".join(code_blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "diff"))
    part = re.search(rf"^\+\+\+ b/{re.escape(path)}\b.*?\n(.*?)(?=^(?:\+\+\+|---) |\Z)", text, re.M | re.S)
    assert part, f"CONTRIBUTING shows no diff of {path}"
    return [line[1:] for line in part[1].splitlines() if line.startswith("+")]


def test_the_diff_of_a_stage_is_the_whole_file():
    path = "ace_ext/pruning/stages/swaps.py"
    assert added_lines(path) == (ROOT / path).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "path",
    [
        "ace_ext/pruning/metrics.py",
        "ace_ext/ops/reference.py",
        "csrc/ops/mask.h",
        "csrc/ops/mask.cpp",
        "csrc/cpu/mask.cpp",
        "csrc/cuda/mask.h",
        "csrc/cuda/mask_glue.cpp",
        "ace_ext/ops/__init__.py",
    ],
)
def test_lines_of_the_diffs_are_in_the_files(path):
    found = " ".join((ROOT / path).read_text(encoding="utf-8").split())
    for line in added_lines(path):
        shown = " ".join(line.removesuffix("...").split())
        spaced = shown.replace("( ", "(")
        assert any(
            text in found or text in found.replace('( "', '("').replace("( ", "(") for text in (shown, spaced)
        ), line
