"""Changes one operator or number of ``csrc/core`` at a time, and counts how many changes the C++ tests notice.

    python tools/mutate.py                        # all changes; prints those that no test notices
    python tools/mutate.py --sample 50 --seed 1   # some of them; --seconds 600: as many as there is time for
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
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from program import count, one_line_errors, positive

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutation"
SECONDS = 60
"""Of a processor's time. A test that takes longer is taken to notice the change: it does not end."""
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
    """All single changes of a header's code that a C++ compiler sees: not of comments, preprocessor lines, and what is
    for a GPU alone, which the tests run as PTX."""
    found, on_gpu = [], False
    for number, text in enumerate(header.read_text().splitlines()):
        code = text.partition("//")[0]
        if code.startswith("#"):
            on_gpu = code.startswith("#if defined(__CUDA") or (on_gpu and code.startswith("#define"))
        if on_gpu or code.lstrip().startswith(("#", "static_assert")):
            continue
        for pattern, others in CHANGES.items():
            for match in re.finditer(pattern, code):
                found += [
                    Mutant(header, number, text, text[: match.start()] + other + text[match.end() :])
                    for other in others
                ]
    return found


@cache
def included_by(test: Path) -> list[str]:
    """The files that a test includes."""
    command = [*CXX, "-MM", "-I", ROOT / "csrc", test]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def tests_of(header: Path) -> list[list[Path]]:
    """The sources of each test that sees a header: its own first, and that of the CUDA kernel of its name last."""
    found = []
    for test in sorted([*ROOT.glob("csrc/tests/core_*_test.cpp"), *ROOT.glob("csrc/tests/cpu_*_test.cpp")]):
        if str(header) in included_by(test):
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
        source = built.with_suffix("")  # what is included where the compiled one does not fit
        source.write_text("#include_next <gtest/gtest.h>\n#include <random>\n")
        subprocess.run([*CXX, "-x", "c++-header", source, "-o", built], check=True)
    return ["-I", str(WORK / "before"), "-include", "gtest/gtest.h"]


def is_fixed(source: Path) -> bool:
    """Whether no change concerns a source."""
    return "simt" in source.parts or source == FLAG


def compiled_once(source: Path) -> Path:
    """The object file of a source that no change concerns, and that a kernel's test is linked with."""
    built = WORK / "objects" / f"{source.stem}.o"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*CXX, "-I", ROOT / "csrc", "-c", "-x", "c++", source, "-o", built], check=True)
    return built


def passes(sources: list[Path], mutant: Mutant | None, place: Path) -> bool | None:
    """Whether a test passes with a change, or (None) as it is. None: it does not compile."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "core").mkdir(parents=True)
    if mutant is not None:
        lines = mutant.header.read_text().splitlines()
        lines[mutant.line] = mutant.after
        (place / "core" / mutant.header.name).write_text("\n".join(lines) + "\n")
    objects = [compiled_once(source) for source in sources if is_fixed(source)]
    changed = [source for source in sources if not is_fixed(source)]
    command = [*CXX, *header_once(), "-I", place, "-I", ROOT / "csrc"]
    command += ["-x", "c++", *changed, "-x", "none", *objects, *LIBRARIES, "-rdynamic"]
    if subprocess.run([*command, "-o", place / "test"], capture_output=True, check=False).returncode:
        return None
    try:
        ended = subprocess.run(
            [place / "test"],
            capture_output=True,
            timeout=20 * SECONDS,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
        )
        return not ended.returncode
    except subprocess.TimeoutExpired:
        return False
    finally:
        shutil.rmtree(place)


class Notices:
    """What becomes of changes, and the check that a test which notices one passes without it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sound: dict[Path, bool | None] = {}

    def of(self, mutant: Mutant, tests: list[list[Path]], place: Path) -> str:
        """``noticed``, ``missed`` or ``does not compile``."""
        for sources in tests:
            with self._lock:
                for source in sources:
                    if is_fixed(source):
                        compiled_once(source)
            found = passes(sources, mutant, place)
            if found is None:
                return "does not compile"
            if not found:
                with self._lock:
                    if sources[0] not in self._sound:
                        self._sound[sources[0]] = passes(sources, None, WORK / "sound")
                if not self._sound[sources[0]]:
                    sys.exit(f"mutate: {sources[0].name} does not pass as it is")
                return "noticed"
        return "missed"


def header_of(name: str) -> Path:
    """A header of ``csrc/core`` by its name."""
    found = {path.stem: path for path in sorted(ROOT.glob("csrc/core/*.h"))}
    if name not in found:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(found)} (got {name!r})")
    return found[name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("headers", nargs="*", type=header_of, help="names of csrc/core without .h; all by default")
    parser.add_argument("--sample", type=count, help="how many changes, drawn at random; all by default")
    parser.add_argument("--seconds", type=positive, help="begin no change after so many; they are then drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be noticed")
    parser.add_argument("--jobs", type=count, default=2)
    args = parser.parse_args(argv)
    if not 0 <= args.least <= 1:
        parser.error(f"--least must be a share from 0 to 1 (got {args.least:g})")
    with one_line_errors(parser):
        return try_all(args)


def try_all(args: argparse.Namespace) -> int:
    """Tries the changes and prints what the tests miss; returns the exit status."""
    headers = args.headers or sorted(ROOT.glob("csrc/core/*.h"))
    tests = {header: tests_of(header) for header in headers}
    mutants = [mutant for header in headers for mutant in mutants_of(header)]
    if args.sample is not None or args.seconds is not None:
        mutants = random.Random(args.seed).sample(mutants, min(args.sample or len(mutants), len(mutants)))
    shutil.rmtree(WORK, ignore_errors=True)  # what was compiled of older sources
    if silent := [header.name for header in headers if not tests[header]]:
        sys.exit(f"mutate: no test includes {', '.join(silent)}")
    header_once()
    notices = Notices()
    start, counts = time.monotonic(), {"noticed": 0, "missed": 0, "does not compile": 0, "no time": 0}

    def one(numbered: tuple[int, Mutant]) -> tuple[Mutant, str]:
        number, mutant = numbered
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            return mutant, "no time"
        return mutant, notices.of(mutant, tests[mutant.header], WORK / f"mutant-{number}")

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
        f"not compile, {counts['no time']} were not tried, {time.monotonic() - start:.0f} s"
    )
    return 0 if share >= args.least else 1


if __name__ == "__main__":
    sys.exit(main())
