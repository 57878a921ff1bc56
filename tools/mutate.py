"""Changes one operator or number of ``csrc/core`` at a time, and counts how many changes the C++ tests notice.

    python tools/mutate.py                        # all changes; prints those that no test notices
    python tools/mutate.py --sample 50 --seed 1   # some of them
    python tools/mutate.py swaps nm_select        # of these headers

For each change, the tests that include the header are compiled without optimisation and run, that of the same name
first, until one fails. A change that does not compile does not count. The tree is not touched: the changed header is in
build/mutation, before the others on the compiler's path; GoogleTest's headers are compiled once. Needs an installed
GoogleTest. The exit status is 1 if fewer than --least (90 %) are noticed.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"
SECONDS = 60
"""A test that takes longer is taken to notice the change: it does not end."""
CXX = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-w", "-ffp-contract=off", "-DACE_SIMT"]
FLAG = ROOT / "csrc" / "cuda" / "score.cu"
"""Holds the flag by which every kernel reports values that are not finite."""
LIBRARIES = ["-lgtest_main", "-lgtest", "-pthread", "-ldl"]

# As clang-format writes them: a binary operator has spaces around it, a template's bracket has not.
CHANGES = {
    r"(?<= )<(?= )": ("<=", ">"),
    r"(?<= )>(?= )": (">=", "<"),
    r"(?<= )<=(?= )": ("<",),
    r"(?<= )>=(?= )": (">",),
    r"(?<= )==(?= )": ("!=",),
    r"(?<= )!=(?= )": ("==",),
    r"(?<= )\+(?= )": ("-",),
    r"(?<= )-(?= )": ("+",),
    r"(?<= )\*(?= )": ("/",),
    r"(?<= )/(?= )": ("*",),
    r"(?<= )\+=(?= )": ("-=",),
    r"(?<= )&&(?= )": ("||",),
    r"(?<= )\|\|(?= )": ("&&",),
    r"(?<= )&(?= )": ("|",),
    r"(?<= )\|(?= )": ("&",),
    r"(?<= )\^(?= )": ("&",),
    r"(?<= )<<(?= )": (">>",),
    r"(?<= )>>(?= )": ("<<",),
    r"(?<=[ (])-(?=[a-z(])": ("",),
    r"(?<=[ (])!(?=[a-z(])": ("",),
    r"(?<=[ (])~(?=[a-z(])": ("",),
    r"\btrue\b": ("false",),
    r"\bfalse\b": ("true",),
    r"(?<![\w.'])0(?=[;,) u]|\.0)": ("1",),
    r"(?<![\w.'])1(?=[;,) u]|\.0)": ("2",),
    r"(?<![\w.'])2(?=[;,) u]|\.0)": ("1",),
}


@dataclass(frozen=True)
class Mutant:
    """A line of a header, changed."""

    header: Path
    line: int
    before: str
    after: str


def mutants_of(header: Path) -> list[Mutant]:
    """All single changes of a header's code, comments and preprocessor lines left out."""
    found = []
    for number, text in enumerate(header.read_text().splitlines()):
        code = text.partition("//")[0]
        if code.lstrip().startswith(("#", "static_assert")):
            continue
        for pattern, others in CHANGES.items():
            for match in re.finditer(pattern, code):
                found += [
                    Mutant(header, number, text, text[: match.start()] + other + text[match.end() :])
                    for other in others
                ]
    return found


def tests_of(header: Path) -> list[list[Path]]:
    """The sources of each test that sees a header: its own first, and that of the CUDA kernel of its name last."""
    found = []
    for test in sorted([*ROOT.glob("csrc/tests/core_*_test.cpp"), *ROOT.glob("csrc/tests/cpu_*_test.cpp")]):
        done = subprocess.run(
            [*CXX, "-MM", "-I", ROOT / "csrc", test], capture_output=True, text=True, check=True
        ).stdout
        if str(header) in done.split():
            found.append([test])
    found.sort(key=lambda sources: header.stem not in sources[0].stem)
    kernel, test = (
        ROOT / "csrc" / "cuda" / f"{header.stem}.cu",
        ROOT / "csrc" / "tests" / f"cuda_{header.stem}_test.cpp",
    )
    if kernel.exists() and test.exists():
        runner = [*ROOT.glob("csrc/simt/ptx/*.cpp"), FLAG]
        found.append([test, kernel, *runner])
    return found


def header_once() -> list[str]:
    """Options that include GoogleTest's header, compiled beforehand; reading it takes most of a test's compilation."""
    built = WORK / "before" / "gtest" / "gtest.h.gch"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        source = built.with_name("source.h")
        source.write_text("#include <gtest/gtest.h>\n#include <random>\n")
        subprocess.run([*CXX, "-x", "c++-header", source, "-o", built], check=True)
    return ["-I", str(WORK / "before"), "-include", "gtest/gtest.h"]


def compiled_once(source: Path) -> Path:
    """The object file of what no change concerns, but the kernels' tests are linked with."""
    built = WORK / "objects" / f"{source.stem}.o"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*CXX, "-I", ROOT / "csrc", "-c", "-x", "c++", source, "-o", built], check=True)
    return built


def notice(mutant: Mutant | None, tests: list[list[Path]], place: Path) -> str:
    """``noticed``, ``missed`` or ``does not compile``."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "core").mkdir(parents=True)
    if mutant is not None:
        lines = mutant.header.read_text().splitlines()
        lines[mutant.line] = mutant.after
        (place / "core" / mutant.header.name).write_text("\n".join(lines) + "\n")
    for sources in tests:
        fixed = [source for source in sources if "simt" in source.parts or source == FLAG]
        objects = [compiled_once(source) for source in fixed]
        changed = [source for source in sources if source not in fixed]
        command = [*CXX, *header_once(), "-I", place, "-I", ROOT / "csrc"]
        command += ["-x", "c++", *changed, "-x", "none", *objects, *LIBRARIES, "-rdynamic"]
        if subprocess.run([*command, "-o", place / "test"], capture_output=True, check=False).returncode:
            return "does not compile"
        try:
            ended = subprocess.run([place / "test"], capture_output=True, timeout=SECONDS, check=False).returncode
        except subprocess.TimeoutExpired:
            return "noticed"
        if ended:
            return "noticed"
    return "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("headers", nargs="*", help="names of csrc/core without .h; all by default")
    parser.add_argument("--sample", type=int, help="how many changes, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be noticed")
    args = parser.parse_args()
    headers = [ROOT / "csrc" / "core" / f"{name}.h" for name in args.headers] or sorted(ROOT.glob("csrc/core/*.h"))
    tests = {header: tests_of(header) for header in headers}
    mutants = [mutant for header in headers for mutant in mutants_of(header)]
    if args.sample is not None:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    shutil.rmtree(WORK, ignore_errors=True)  # what was compiled of older sources
    for header in headers:  # the tests must pass and build as they are, or every change would count as noticed
        if not tests[header] or notice(None, tests[header], WORK / "sound") != "missed":
            sys.exit(f"mutate: {header.name} has no tests that pass as it is")
    start, counts = time.monotonic(), {"noticed": 0, "missed": 0, "does not compile": 0}

    def one(numbered: tuple[int, Mutant]) -> tuple[Mutant, str]:
        number, mutant = numbered
        place = WORK / f"mutant-{number}"
        try:
            return mutant, notice(mutant, tests[mutant.header], place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, found in pool.map(one, enumerate(mutants)):
            counts[found] += 1
            if found == "missed":
                print(
                    f"missed: {mutant.header.name}:{mutant.line + 1}: {mutant.before.strip()}  ->  "
                    f"{mutant.after.strip()}",
                    flush=True,
                )
    run = counts["noticed"] + counts["missed"]
    share = counts["noticed"] / run if run else 0.0
    print(
        f"mutate: {counts['noticed']} of {run} changes noticed ({share:.1%}), {counts['does not compile']} more did "
        f"not compile, {time.monotonic() - start:.0f} s"
    )
    return 0 if share >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
