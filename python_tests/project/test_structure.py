"""The structure of the package: which subpackage may import which, no import cycles, few constructor arguments."""

import ast
from functools import cache
from pathlib import Path

import pytest

import ace_ext

SOURCES = Path(__file__).parents[2] / "ace_ext"

LAYERS = [
    {"errors", "version", "fingerprint", "whole_files", "process_memory", "process_threads", "dense_weights", "records"}
    | {"_registry"},
    {"ops", "grids"},
    {"models"},
    {"packed"},
    {"data"},
    {"runtime"},
    {"serving"},
    {"bench"},
    {"pruning"},
    {"healing"},
    {"structures"},
    {"engine", "formats", "cards"},
    {"runs", "compare"},
    {"reporting"},
    {"cli"},
]
"""From the bottom: a part may import those of the layers below it, and of its own layer what :data:`BESIDE` says."""
BESIDE = {("records", "dense_weights")} | {
    (part, "errors") for part in ("process_memory", "records", "fingerprint", "whole_files")
}
MAX_ARGUMENTS = 7
RECORDS = {
    "RunContext": "the services of a run",
    "PruneConfig": "what a user asks for",
    "MatrixReport": "a row of the report",
    "PruneReport": "the report",
    "Healing": "a part of the report",
    "Removed": "a part of the report",
    "VerifyResult": "what ace-prune verify prints",
    "Run": "a line of runs.jsonl",
    "Estimate": "a row of the memory estimate",
    "Plan": "what ace-prune plan prints",
    "ModelShape": "sizes of a model",
    "BenchResult": "what ace-prune bench prints",
    "Figures": "a row of what ace-prune bench prints",
    "PackResult": "what ace-prune pack prints",
    "Origin": "the metadata of a packed file",
    "Agreement": "a part of the report",
    "BlockCall": "how a batch enters the blocks",
}
"""Dataclasses that hold data and do nothing with it; they may have more fields."""


def modules() -> dict[str, Path]:
    """The package's modules by dotted name."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports, wherever in it."""
    known = modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ace_ext":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if alias.name != "_C":  # the compiled module
                    found.add(whole if whole in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ace_ext"}
    return frozenset(found)


def part_of(module: str) -> str:
    """``ops`` for ``ace_ext.ops.reference``; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_every_part_has_a_layer():
    parts = {part_of(name) for name in modules()} - {"", "__main__"}
    assert parts == set().union(*LAYERS)


@pytest.mark.parametrize("name", [n for n in modules() if part_of(n) not in ("", "__main__")])
def test_imports_go_down(name):
    own = part_of(name)
    for other in imports(modules()[name]):
        part = part_of(other)
        if part in ("", "_C", own) or (own, part) in BESIDE:
            continue
        assert layer_of(part) < layer_of(own), f"{name} imports {other}"


def test_no_circle_between_files():
    graph = {name: imports(path) & set(modules()) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_oracle_imports_nothing_of_the_fast_path():
    for file in ("reference.py", "mean_reference.py", "packed_reference.py"):
        assert imports(SOURCES / "ops" / file) <= {"ace_ext.errors"}


def test_each_subpackage_says_what_it_is_for():
    for path in SOURCES.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert "import" in text, f"{path} does not say what it may import"


def constructor_arguments(node: ast.ClassDef) -> int:
    """How many arguments a class takes: those of ``__init__``, or a dataclass's fields."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = item.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            return len(named) - 1 + (arguments.kwarg is not None)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return sum("ClassVar" not in ast.unparse(item.annotation) for item in fields)
    return 0


def test_classes_take_few_arguments():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name not in RECORDS:
                assert constructor_arguments(node) <= MAX_ARGUMENTS, f"{name}.{node.name}"


def test_only_records_are_excepted():
    """Each exception is still needed."""
    counted = {
        node.name: constructor_arguments(node)
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: counted.get(name) for name in RECORDS if counted.get(name, 0) <= MAX_ARGUMENTS}


def test_the_public_names():
    assert set(ace_ext.__all__) == {
        "InputError",
        "PruneConfig",
        "PruneReport",
        "SparsityPattern",
        "__version__",
        "build_info",
        "load_packed",
        "prune_model",
        "register",
    }
