"""Reports as one HTML file that needs nothing else: plots inside it, no script, no outside address."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from ace_ext.errors import InputError
from ace_ext.reporting.plots import require_matplotlib

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --soft: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #444; --soft: #22252a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; overflow-wrap: normal; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--soft); } .number { text-align: right; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th:first-child { background: var(--soft); }
td:first-child { max-width: 10rem; white-space: normal; overflow-wrap: break-word; }
.words td:nth-child(2) { white-space: normal; overflow-wrap: anywhere; width: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .875rem; }
img { display: block; width: 100%; max-width: 32rem; height: auto; background: #fff; border-radius: 4px; }
summary { cursor: pointer; padding: .6rem 0; }
"""


def check_report(path: str | Path) -> None:
    """Asked before the work, not after it: can :func:`write_run_report` write there?

    Raises:
        InputError: matplotlib is not installed, or ``path`` is a folder or in a folder that is not there.
    """
    require_matplotlib()
    path = Path(path).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"report must be a file name in a folder that is there (got {str(path)!r}); e.g. report.html")


# --- pieces of a page -------------------------------------------------------------------------------------------------


def _page(title: str, body: Iterable[str]) -> str:
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return f"{head}\n<body>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int) -> str:
    """A table that scrolls inside itself. Columns from ``numbers_from`` on stand to the right."""

    def row(tag: str, values: Sequence[str]) -> str:
        marks = ["" if index < numbers_from else ' class="number"' for index in range(len(values))]
        return "".join(f"<{tag}{mark}>{html.escape(value)}</{tag}>" for mark, value in zip(marks, values, strict=True))

    body = "\n".join(f"<tr>{row('td', line)}</tr>" for line in lines)
    return f'<div class="scroll"><table>\n<tr>{row("th", head)}</tr>\n{body}\n</table></div>'


def _settings(values: dict) -> str:
    table = _table(["setting", "value"], [[name, _plain(value)] for name, value in values.items()], 2)
    return f'<div class="words">{table}</div>'


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(name if element is None else f"{name} {_plain(element)}" for name, element in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _plot(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _write(path: Path, content: str | bytes) -> Path:
    try:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"report {str(path)!r} cannot be written: {error.strerror}; give another name") from error
    return path
