"""Texts that are mixed by weights, ``"bundled + my.txt"`` or ``"2 * bundled + my.txt"``: how their name is read, and
how many samples are drawn from each."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ace_ext.data.local_files import same_file
from ace_ext.errors import InputError

_PLUS = re.compile(r"\s+\+\s+")  # with spaces around it: c++.txt and a+b.txt are names of files
_WEIGHTED = re.compile(r"(?P<weight>[0-9.]+)\s*\*\s*(?P<source>.*\S)")


@dataclass(frozen=True)
class Part:
    """A text of a mixture, and its weight relative to the others."""

    source: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.source if self.weight == 1 else f"{self.weight:g} * {self.source}"


def parts_of(source: str, unmixed: str) -> tuple[Part, ...]:
    """The texts that a name stands for; one for a name that is not a mixture.

    Args:
        source: a name or a path, or several, joined by ``+`` between spaces, each with a weight before ``*`` or not.
        unmixed: a name that cannot be mixed.

    Raises:
        InputError: a text is missing or given twice or cannot be mixed, or a weight is not a number above 0.
    """
    texts = _PLUS.split(source)
    if len(texts) == 1:
        return (Part(source),)
    parts = tuple(_part(text.strip(), source) for text in texts)
    names = [part.source for part in parts]
    if any(one == other or same_file(one, other) for one, other in combinations(names, 2)):
        raise InputError(f"text: {source!r} names a text twice; give it once, with a weight such as 2 * {names[0]}")
    if unmixed in names:
        raise InputError(f"text: {unmixed!r} cannot be mixed with other texts; use it alone, or leave it out")
    return parts


def _part(text: str, whole: str) -> Part:
    found = _WEIGHTED.fullmatch(text)
    if found is None:
        if not text or "*" in text:
            raise InputError(f'source: {whole!r} has no text or no weight at {text!r}; write "2 * bundled + my.txt"')
        return Part(text)
    try:
        weight = float(found["weight"])
    except ValueError:
        weight = 0.0
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"text: {whole!r} has the weight {found['weight']!r}; use a number above 0")
    return Part(found["source"], weight)


def samples_of(parts: tuple[Part, ...], nsamples: int) -> list[int]:
    """How many of the samples are drawn from each text: their shares by weight, with the largest remainders rounded up.

    Raises:
        InputError: a text would get none.
    """
    whole = sum(part.weight for part in parts)
    exact = [nsamples * part.weight / whole for part in parts]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])  # a stable sort: the first on a tie
    for i in by_remainder[: nsamples - sum(counts)]:
        counts[i] += 1
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise InputError(
                f"nsamples: {nsamples} found, of which {part.source} gets none; use more samples or a larger weight"
            )
    return counts


def without_folders(source: str) -> str:
    """A text's name with each path replaced by its last part; in a mixture by as many parts as its texts differ in."""
    texts = _PLUS.split(source)
    if len(texts) == 1:
        return Path(source).name
    weighted = [_WEIGHTED.fullmatch(text) for text in texts]
    names = _short([found["source"] if found else text for found, text in zip(weighted, texts, strict=True)])
    return " + ".join(
        f"{found['weight']} * {name}" if found else name for found, name in zip(weighted, names, strict=True)
    )


def _short(paths: list[str]) -> list[str]:
    """The last part of each path; as many parts as it takes if two would have the same name."""
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = [str(Path(*each[-count:])) for each in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def is_jsonl(sources: Iterable[str | None]) -> bool:
    """Whether one of the texts, or a part of one, is a ``.jsonl`` file."""
    return any(part.strip().lower().endswith(".jsonl") for source in sources if source for part in _PLUS.split(source))
