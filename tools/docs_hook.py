"""MkDocs hook: generates the parts of the documentation that describe the code from the code.

A line ``{{ name: words }}`` of a page is replaced by ``PARTS[name]()``. The API reference gets a page for each package
under ``ace_ext/``. ace_ext must be importable, for the parser and the tables of names; the API reference is read from
the sources.
"""

import ast
import html
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("docs_hook")

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "API reference"
OWN_PAGE = ("ace_ext.ops.reference",)
"""Modules with their own page."""
LEFT_OUT = ("ace_ext.__main__", "ace_ext.cli")
"""Not part of the API; the command line has its own page."""
INTERNAL = (
    "Stable names are those of [ace_ext](ace_ext.md) and those that the [examples](../examples.md) import; "
    "others may change between versions."
)

# --- parts of pages ---------------------------------------------------------------------------------------------------


def command_line() -> str:
    """The ``--help`` of the program and of each of its verbs."""
    import argparse

    from ace_ext.cli.main import build_parser

    os.environ["COLUMNS"] = "110"  # argparse folds lines at the terminal's width
    parser = build_parser()
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    text = [_fenced(parser.format_help())]
    for name, verb in verbs.choices.items():
        text += [f"## ace-prune {name}", _fenced(verb.format_help_all())]
    return "\n\n".join(text)


def metrics() -> str:
    """The table of metrics: name, formula, kinds of statistics."""
    from ace_ext.pruning.metrics import DEFAULT_METRIC, METRICS

    rows = [
        (f"`{name}`" + (" (default)" if name == DEFAULT_METRIC else ""), _code(metric.formula), _list(metric.needs))
        for name, metric in METRICS.items()
    ]
    return _table(("name", "score of `W_ij`", "statistics"), rows)


def presets() -> str:
    """The table of presets and published methods, and the texts that they stand for."""
    from ace_ext.pruning.method import PRESETS, PUBLISHED

    rows = [(f"`{name}`", f"`{text}`") for name, text in (PRESETS | PUBLISHED).items()]
    return _table(("`--method`", "stands for"), rows)


def stages() -> str:
    """The table of stages and their options."""
    from ace_ext.pruning.stages import KINDS, Score, stages_of

    rows = []
    for kind in KINDS:
        if kind is Score:
            rows.append(("a metric's name", "keeps the weights with the highest scores", "`ria` has `exponent` (0.5)"))
            continue
        for name, stage in stages_of(kind).items():
            options = [
                f"`{setting.name}`{'' if setting.default is None else f' ({setting.default})'}: {setting.help}"
                for setting in stage.settings()
            ]
            rows.append((f"`{name}`", stage.summary, "<br>".join(options).replace("|", "&#124;")))
    return _table(("stage", "what it does", "options (defaults)"), rows)


def groups() -> str:
    """The table of comparison groups (``--group``)."""
    from ace_ext.pruning.groups import GROUPS

    return _table(("`--group`", "compared weights"), [(f"`{name}`", group.summary) for name, group in GROUPS.items()])


def formats() -> str:
    """The table of output formats (``--format``)."""
    from ace_ext.formats import FORMATS

    return _table(("`--format`", "what is written"), [(f"`{name}`", entry.summary) for name, entry in FORMATS.items()])


def examples() -> str:
    """Each script of ``examples/``: its docstring, then its code."""
    text = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        body = source.split('"""', 2)[2].strip()
        text += [f"## {path.name}", ast.get_docstring(ast.parse(source)), _fenced(body, "python")]
    return "\n\n".join(text)


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part for part in (command_line, metrics, presets, stages, groups, formats, examples)
}


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;').replace('*', '&#42;').replace('_', '&#95;')}</code>"


def _list(values) -> str:
    return ", ".join(sorted(values)) or "none"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the API reference ------------------------------------------------------------------------------------------------


def packages() -> Iterator[tuple[str, list[str]]]:
    """``(title, modules)`` of each page: every package of ``ace_ext`` with its public modules."""
    source = ROOT / "ace_ext"
    for init in sorted(source.rglob("__init__.py")):
        package = ".".join(init.parent.relative_to(ROOT).parts)
        names = [f"{package}.{path.stem}" for path in sorted(init.parent.glob("*.py")) if not path.stem.startswith("_")]
        if not any(f"{package}.".startswith(f"{out}.") for out in LEFT_OUT):
            yield package, [package, *(name for name in names if name not in (*OWN_PAGE, *LEFT_OUT))]
            yield from ((name, [name]) for name in names if name in OWN_PAGE)


def _reference_page(modules: list[str]) -> str:
    """The page of a package: its docstring and names, then module by module."""
    title, *others = modules
    text = [f"# {title}"]
    if title != "ace_ext":
        text.append(INTERNAL)
    text.append(f"::: {title}\n    options:\n      show_root_heading: false\n      heading_level: 1")
    return "\n\n".join([*text, *(f"::: {name}" for name in others)])


# --- events of MkDocs -------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the reference's pages into the navigation."""
    entry = next(entry for entry in config.nav if REFERENCE in entry)
    entry[REFERENCE] = [{title: f"reference/{title}.md"} for title, _ in packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference's pages."""
    for title, modules in packages():
        files.append(File.generated(config, f"reference/{title}.md", content=_reference_page(modules)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces a page's ``{{ name: words }}`` lines, whose words are for readers of the source. An unknown name is a
    KeyError, which ends the build."""
    return re.sub(r"^\{\{ (\w+): [^}\n]* \}\}$", lambda match: PARTS[match[1]](), markdown, flags=re.MULTILINE)


_RULED_TABLE = re.compile(r"^(?:<p>)?={3,} +={3,}", re.MULTILINE)
_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc|obj):<code>[~.]*([\w.]+)</code>")


def on_page_content(html: str, page: Page, **_) -> str:
    """Turns Sphinx roles in docstrings into links; names that are not in the reference stay code."""
    if _RULED_TABLE.search(html):
        log.warning("%s: a docstring's table is shown as text; indent it by four more spaces", page.file.src_uri)
    return _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
