"""Prints the licence of each package that ``pip install ace_ext`` brings; one without a licence is an error.

    python tools/licenses.py

Read from the metadata of what is installed here, so torch's build for CUDA lists NVIDIA's libraries too. Python 3.11
or later.
"""

import importlib.metadata as metadata
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tabulate import tabulate

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
CLASSIFIER = "License :: OSI Approved :: "


def needed(lines: list[str], extras: set[str] | None = None) -> dict[str, set[str]]:
    """The packages that requirements name, for this system, and the extras that are asked for of each."""
    found: dict[str, set[str]] = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *(extras or ()))):
            found.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    return found


def with_their_own(direct: dict[str, set[str]]) -> set[str]:
    """The packages and all that they need."""
    found: dict[str, set[str]] = {}
    waiting = list(direct.items())
    while waiting:
        name, extras = waiting.pop()
        if name in found and extras <= found[name]:
            continue
        found.setdefault(name, set()).update(extras)
        waiting += needed(metadata.requires(name) or [], found[name]).items()
    return set(found)


def license_of(package: str) -> str:
    """As SPDX where the package says so, else in its own words or those of its classifiers; "" if it says nothing."""
    about = metadata.metadata(package)
    if expression := about.get("License-Expression"):
        return expression
    text = (about.get("License") or "").strip()
    if text and "\n" not in text and len(text) < 60:
        return text
    lines = about.get_all("Classifier") or []
    return ", ".join(line.removeprefix(CLASSIFIER) for line in lines if line.startswith(CLASSIFIER))


def main() -> int:
    direct = needed(tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    rows = [(name, license_of(name), "yes" if name in direct else "") for name in sorted(with_their_own(direct))]
    print(tabulate(rows, headers=["package", "licence", "named by ace_ext"], tablefmt="github"))
    silent = [name for name, found, _ in rows if not found]
    if silent:
        print(f"licenses: no licence in the metadata of {', '.join(silent)}", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
