"""Renders the templates of this package into HTML pages that need no other file, and writes them.

Templates get tables and plots as the classes here, and escape all text.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ace_ext.errors import InputError
from ace_ext.reporting.plots import require_matplotlib
from ace_ext.runs.own_files import PAGE_MARK, check_replaceable, is_page
from ace_ext.whole_files import written_whole

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"


@dataclass(frozen=True)
class Table:
    """Lines of text cells, as many in each line as in ``head``. Columns from ``numbers_from`` on are aligned right."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    numbers_from: int

    @classmethod
    def of_settings(cls, values: Mapping[str, object]) -> "Table":
        """A line for each name and value. A dictionary of dictionaries gets a line for each of its entries."""
        lines: list[list[str]] = []
        for name, value in values.items():
            if isinstance(value, dict) and any(isinstance(entry, dict) for entry in value.values()):
                lines += [[f"{name}: {key}", plain(entry)] for key, entry in value.items()]
            else:
                lines.append([name, plain(value)])
        return cls(["setting", "value"], lines, 2)


@dataclass(frozen=True)
class Plot:
    """A PNG and the caption below it."""

    png: bytes
    caption: str

    @property
    def base64(self) -> str:
        """The PNG as text, for a ``data:`` address."""
        return base64.b64encode(self.png).decode("ascii")


def check_report(path: str | Path) -> None:
    """Checks that the report of a run can be written to ``path``. Call it before the run.

    Raises:
        InputError: matplotlib is not installed, the folder of ``path`` does not exist, or ``path`` is a file that this
            program did not write.
    """
    require_matplotlib()
    check_replaceable("report", Path(os.path.expanduser(path)), "page of ace-prune", is_page)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ace_ext.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, title: str, **values: object) -> str:
    """The page: a template of this package, with a title and the values that the template names."""
    return _environment().get_template(f"{template}.html.j2").render(title=title, mark=PAGE_MARK, **values)


def plain(value: object) -> str:
    """A setting's value as text: lists and dictionaries with commas, ``none`` for None and an empty list."""
    if isinstance(value, dict):
        return ", ".join(name if element is None else f"{name} {plain(element)}" for name, element in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return "none" if value is None else str(value)


def write_file(path: Path, content: str | bytes) -> Path:
    """Writes a page or a PNG, and returns ``path``.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with written_whole(path) as part:
            part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"report {str(path)!r} cannot be written: {error.strerror}; give another name") from error
    return path
