"""What comes from elsewhere: pinned releases, licences, and the commands of ``docs/trust.md``."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TRUST = (ROOT / "docs" / "trust.md").read_text()


def requirements(text: str) -> list[Requirement]:
    """Those of a list in pyproject.toml, or of a file with one a line."""
    lines = re.findall(r'"([^"]+)"', text) or [line for line in text.splitlines() if not line.startswith("#")]
    return [Requirement(line) for line in lines if line.strip()]


def list_of(name: str) -> str:
    """A list of pyproject.toml as it is written (Python 3.10 has no tomllib)."""
    return re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.M | re.S)[1]


def pins() -> dict[str, list[str]]:
    """The releases of .ci/constraints.txt by name; several where it depends on the Python."""
    found: dict[str, list[str]] = {}
    for requirement in requirements((ROOT / ".ci" / "constraints.txt").read_text()):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


@pytest.mark.parametrize("name", ["requires", "dependencies", "report", "test"])
def test_ci_pins_what_pyproject_names(name):
    pinned = pins()
    for requirement in requirements(list_of(name)):
        for version in pinned[canonicalize_name(requirement.name)]:
            assert requirement.specifier.contains(version), requirement


def test_the_tools_have_the_same_versions_everywhere():
    pinned = pins()
    tools = {tool.name: tool for tool in requirements((ROOT / ".ci" / "tools.txt").read_text())}
    for name, tool in tools.items():
        assert tool.specifier.contains(pinned[canonicalize_name(name)][0]), name
    hooks = re.findall(r"/([\w-]+)\n    rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    names = [re.sub("^mirrors-|-pre-commit$", "", name) for name, _ in hooks]
    assert set(names) == {"ruff", "clang-format", "codespell", "typos"}
    for name, (_, version) in zip(names, hooks, strict=True):
        assert str(tools[name].specifier) == f"=={version}"


def test_the_table_of_licences_has_what_pyproject_names():
    table = {canonicalize_name(name) for name in re.findall(r"^\| ([\w-]+) \| [^|]+ \|$", TRUST, re.M)}
    direct = {canonicalize_name(requirement.name) for requirement in requirements(list_of("dependencies"))}
    assert direct < table


def test_the_tests_that_it_names_exist():
    """In its table of what the first review found."""
    table = TRUST.partition("## What the first review found")[2].partition("\n## ")[0]
    named = [
        (file, names) for row in table.splitlines() for file, names in re.findall(r"([\w/]+): ((?:`\w+`,? ?)+)", row)
    ]
    assert len(named) > 20
    for file, names in named:
        path = ROOT / "python_tests" / file
        text = path.with_name(f"test_{path.name}.py").read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert f"\ndef {name}(" in text, f"{file}: {name}"


def test_mutation_testing_names_files_that_exist():
    """mutmut takes a pattern without a match for nothing to do."""
    for name in ("only_mutate", "pytest_add_cli_args_test_selection"):
        patterns = re.findall(r'"([^"]+)"', list_of(name))
        assert patterns
        assert [pattern for pattern in patterns if not list(ROOT.glob(pattern))] == []


def test_what_make_test_quick_leaves_out_exists():
    """pytest ignores a file that does not exist without a word."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    names = re.search(r"^SLOW := (.+)$", makefile, re.M)[1].split()
    assert [name for name in names if not (ROOT / "python_tests" / f"{name}.py").is_file()] == []


def test_its_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for line in re.findall(r"`make ([a-z -]+)`", TRUST) for target in line.split()}
    assert len(named) > 10
    assert named <= targets


def test_make_nightly_and_the_nightly_job_have_the_same_parts():
    makefile, job = (ROOT / "Makefile").read_text(), (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    parts = re.search(r"^nightly: (.+)$", makefile, re.M)[1].split()
    assert sorted(parts) == sorted(re.search(r"part: \[(.+)\]", job)[1].split(", "))
