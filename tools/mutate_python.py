"""Changes one operator, number, condition or call of the Python code at a time, and counts how many changes the tests
notice.

    python tools/mutate_python.py                                      # masks, solvers, workspace and loaders
    python tools/mutate_python.py pruning/masks.py --sample 50 --seed 1    # or --seconds 600

First the tests in TESTS run once with coverage, to see which of them reach which line. For each change, those that
reach its line are run, the quickest first, until one fails; a change of a line that none reaches is missed. The tree is
not touched: tests run in a copy of it. Texts, annotations, assertions and what is raised are not changed. Needs
coverage, and the extension, built in place or installed. The exit status is 1 if fewer than --least (90 %) are noticed.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutants import add_options, drawn

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation-python"
TREE = WORK / "tree"

MODULES = ("pruning/masks", "pruning/groups", "pruning/pattern", "pruning/row_shares", "pruning/prune_linear")
MODULES += ("pruning/solvers/*", "pruning/gram")
MODULES += ("runs/workspace", "runs/unfinished", "runs/written_sums", "runs/own_files")
MODULES += ("models/loading", "models/location", "models/checksums", "models/gguf", "models/tensor_map")
MODULES += ("models/safetensors_header", "models/safetensors_files")
TESTS = ("masks", "layouts", "registries", "config", "solvers", "mean_solvers", "gram", "tune", "allocation", "methods")
TESTS += ("driver", "selection", "resume", "overwriting", "full_disk", "overlap", "stats_file", "loading", "shards")
TESTS += ("hostile_models", "checkpoint", "offload", "verify", "experts", "bos", "moved", "ranks")

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,  # codespell:ignore notin
    ast.NotIn: ast.In,  # codespell:ignore notin
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
LEFT_ALONE = (ast.JoinedStr, ast.Assert, ast.Raise, ast.Import, ast.ImportFrom)


@dataclass
class Mutant:
    """A module with one change."""

    module: Path
    lines: tuple[int, int]
    """The first and last line of the statement, or of the head of a compound one."""
    before: str
    after: str
    source: str


def changes_of(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in place of a node; None: a ``pass``."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            if type(operator) in SWAPPED:
                changed = copy.deepcopy(node)
                changed.ops[place] = SWAPPED[type(operator)]()  # type: ignore[call-overload]
                yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPPED:
        changed = copy.deepcopy(node)
        changed.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
        if not any(isinstance(part, ast.JoinedStr) or is_text(part) for part in ast.walk(node)):
            yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.0)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield None
    elif isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.BoolOp):
        changed = copy.deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def places_of(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None, tuple[int, int]]]:
    """Each node that may be changed: its parent, the field that holds it with the index in a list, and its lines."""

    def inside(parent: ast.AST, lines: tuple[int, int]) -> Iterator[tuple[ast.AST, str, int | None, tuple[int, int]]]:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or isinstance(node, LEFT_ALONE):
                    continue
                own = lines
                if isinstance(node, ast.stmt):
                    body = getattr(node, "body", None)
                    last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
                    own = node.lineno, last
                yield parent, field, index, own
                yield from inside(node, own)

    return inside(tree, (0, 0))


def mutants_of(module: Path) -> list[Mutant]:
    """All single changes of a module."""
    text = module.read_text()
    found = []
    for number, (parent, field, index, lines) in enumerate(places_of(ast.parse(text))):
        node = getattr(parent, field) if index is None else getattr(parent, field)[index]
        for order, _ in enumerate(changes_of(node)):
            tree = ast.parse(text)  # a fresh one, in which the same place is found again by its number
            parent, field, index, _ = next(place for n, place in enumerate(places_of(tree)) if n == number)
            node = getattr(parent, field) if index is None else getattr(parent, field)[index]
            changed = list(changes_of(node))[order] or ast.Pass()
            before, after = (ast.unparse(part).splitlines()[0] for part in (node, changed))
            if index is None:
                setattr(parent, field, changed)
            else:
                getattr(parent, field)[index] = changed
            source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
            found.append(Mutant(module.relative_to(ROOT), lines, before, after, source))
    return found


def run_tests(arguments: list[str], seconds: float, plugins: list[object] | None = None) -> bool | None:
    """Whether pytest passes in the copy of the tree, in a process forked from this one; None: it found no tests, or
    could not run. A run that takes longer does not pass."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        sys.dont_write_bytecode = plugins is None
        nowhere = os.open(os.devnull if plugins is None else WORK / "mapping.log", os.O_WRONLY | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        os.chdir(TREE)
        os.environ["PYTHONPATH"] = str(TREE)
        sys.path[:0] = [str(TREE), str(TREE / "python_tests")]
        import pytest

        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], plugins=plugins)
        os._exit(status)
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests started and left
    return None if code in (4, 5) else code == 0


class Mapping:
    """A plugin of pytest that finds out which test reaches which line, and how long it takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_sessionstart(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(data_file=None, source=[str(TREE / "ace_ext")], config_file=False)
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.seconds[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.monotonic() - self.seconds[nodeid]

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[int, list[str]]] = {}
        for file in data.measured_files():
            found = data.contexts_by_lineno(file)
            lines[str(Path(file).relative_to(TREE))] = {n: [test for test in found[n] if test] for n in found}
        (WORK / "mapping.json").write_text(json.dumps({"lines": lines, "seconds": self.seconds}))


def copy_tree() -> None:
    """The files under version control and the extension, in ``TREE``."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, TREE / name)
    extension = next((ROOT / "ace_ext").glob("_C*.so"), None)
    if extension is None:  # not built in place, so that of the installed package
        find = "import torch, ace_ext._C; print(ace_ext._C.__file__)"
        found = subprocess.run([sys.executable, "-c", find], cwd=WORK, capture_output=True, text=True, check=True)
        extension = Path(found.stdout.strip())
    shutil.copy2(extension, TREE / "ace_ext" / extension.name)


def tests_of(mutant: Mutant, known: dict) -> list[str]:
    """The tests that reach a change, the quickest first; for what runs at import, those that reach the module."""
    lines = known["lines"].get(str(mutant.module), {})
    own = {test for n in range(mutant.lines[0], mutant.lines[1] + 1) for test in lines.get(str(n), [])}
    ran = any(str(n) in lines for n in range(mutant.lines[0], mutant.lines[1] + 1))
    if ran and not own:
        own = {test for tests in lines.values() for test in tests}
    return sorted(own, key=lambda test: (known["seconds"][test], test))


def noticed(mutant: Mutant, known: dict) -> bool:
    tests = tests_of(mutant, known)
    if not tests:
        return False
    place = TREE / mutant.module
    before, times = place.read_bytes(), place.stat()
    place.write_text(mutant.source)
    os.utime(place, (1, 1))  # so that no compiled file fits
    try:
        return run_tests(tests, 60 + 5 * sum(known["seconds"][test] for test in tests)) is not True
    finally:
        place.write_bytes(before)
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="files below ace_ext; those of MODULES by default")
    add_options(parser)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="names of the files of tests; by default TESTS")
    parser.add_argument("--keep-mapping", action="store_true", help="use what an earlier call found of tests and lines")
    args = parser.parse_args()
    names = [name.removesuffix(".py") for name in args.modules] or MODULES
    modules = [path for name in names for path in sorted((ROOT / "ace_ext").glob(f"{name}.py"))]
    mutants = drawn([mutant for module in modules for mutant in mutants_of(module)], args)
    import torch
    import transformers.models.llama.modeling_llama

    assert transformers, "imported before the processes are forked"
    torch.set_num_threads(1)
    if not args.keep_mapping:
        shutil.rmtree(WORK, ignore_errors=True)
        copy_tree()
        tests = [f"python_tests/test_{name}.py" for name in args.tests]
        if not run_tests(tests, 3600, [Mapping()]):
            sys.exit(f"mutate_python: the tests do not pass as they are: {WORK / 'mapping.log'}")
    known = json.loads((WORK / "mapping.json").read_text())
    if not run_tests(["--collect-only", *known["seconds"]], 600):
        sys.exit("mutate_python: tests cannot be called by the names that pytest gave them")
    start, count, run = time.monotonic(), 0, 0
    for mutant in mutants:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            break
        run += 1
        if noticed(mutant, known):
            count += 1
        else:
            print(f"missed: {mutant.module}:{mutant.lines[0]}: {mutant.before}  ->  {mutant.after}", flush=True)
    share = count / run if run else 0.0
    print(
        f"mutate_python: {count} of {run} changes noticed ({share:.1%}), {len(mutants) - run} were not tried, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0 if share >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
