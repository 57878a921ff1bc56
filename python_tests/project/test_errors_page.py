"""The messages that ``docs/errors.md`` quotes are those of the sources."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PLACEHOLDER = "\0"
BY_OTHERS = {"Bad CRC-32", "cannot be written: No space left on device"}
"""Texts of Python and of the system, in whole or in part."""


def quoted() -> list[str]:
    """The first column of the tables of messages."""
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    tables = [rest.partition("\n\n")[0] for rest in page.split("| message | when | what to do |")[1:]]
    cells = [row.removeprefix("| ").split(" | ")[0] for table in tables for row in table.splitlines()[2:]]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@cache
def texts() -> list[str]:
    """Every string of ``ace_ext``; what an f-string inserts is one PLACEHOLDER."""
    found = []
    for path in sorted((ROOT / "ace_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else PLACEHOLDER for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def parts(message: str) -> list[str]:
    """The words between what a message inserts: names, numbers, and what is left out (``…``)."""
    split = re.split(r"…|\[\.\.\]|\b[A-Z]{1,5}\b(?!-)|\bfloat32\b|\badmm\b|\b\d[\d.]*|[(),:;?]", message)
    return [part.strip() for part in split if len(part.split()) > 1]


def test_messages_are_found():
    assert len(quoted()) > 40
    assert parts("line N of … has changed since it was written") == ["has changed since it was written"]


@pytest.mark.parametrize("message", [message for message in quoted() if message not in BY_OTHERS])
def test_message_is_in_the_sources(message):
    for part in parts(message):
        assert any(part in text for text in texts()), part
