"""Small tasks for lm-eval that need no hub. They are made from the held-out part of the bundled text, and from random
numbers with fixed seeds, so all runs have the same samples.

- ``local_last_word``: the last word of a passage, which occurs in it before (as in LAMBADA, arXiv 1606.06031).
- ``local_article``, ``local_function``: which of four continuations is the true one (as in HellaSwag, arXiv
  1905.07830); the others are from other places.
- ``local_arithmetic``: the result of a sum, a difference or a product, with four examples; one of four numbers.
- ``local_recall``: the value of a key among sixteen pairs; one of four values that are all in the text.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from ace_ext.data.bundled import bundled_text
from ace_ext.data.corpora import HELD_OUT

LOCAL = "local"
"""The name that stands for all of them."""
CHOICES = 4
SAMPLES = 200
"""Samples of a task, at most."""

Sample = dict[str, Any]
"""``context``, and either ``target``, or ``choices`` and ``answer``, the position of the true one."""

_PROSE = ("encyclopedia", "news", "dialogue")
_PASSAGE = (300, 600)
"""Characters of a passage, at least and at most."""
_CONTEXT, _CONTINUATION = 300, 90
"""Characters of a beginning and of its continuation, at least."""
_LAST_WORD = re.compile(r"(?<= )[A-Za-z]{4,}(?=[.,;:!?])")


def last_word() -> list[Sample]:
    """Passages that end before a stop or a comma, and whose last word is one of those before."""
    found = []
    for document in bundled_text(HELD_OUT, *_PROSE):
        text = " ".join(document.split())
        for word in _LAST_WORD.finditer(text):
            context = text[max(0, word.start() - _PASSAGE[1]) : word.start() - 1].partition(" ")[2]
            if len(context) >= _PASSAGE[0] and word.group() in re.findall("[A-Za-z]+", context):
                found.append({"context": context, "target": f" {word.group()}"})
    return _some(found)


def article() -> list[Sample]:
    """Beginnings of articles, cut between two words."""
    pieces: list[tuple[str, str]] = []
    for document in bundled_text(HELD_OUT, *_PROSE):
        words = " ".join(document.split()).split(" ")
        pieces += _cuts(words, " ")
    return _among_others(pieces)


def function() -> list[Sample]:
    """Beginnings of Python code, cut between two lines."""
    pieces: list[tuple[str, str]] = []
    for document in bundled_text(HELD_OUT, "code"):
        lines = [line for line in document.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        pieces += _cuts(lines, "\n")
    return _among_others(pieces)


def arithmetic() -> list[Sample]:
    """Sums, differences and products of random numbers."""
    draw = random.Random(0)
    return [_sum(draw) for _ in range(SAMPLES)]


def recall() -> list[Sample]:
    """Random numbers for random keys, of which one is asked for."""
    draw = random.Random(0)
    return [_pairs(draw) for _ in range(SAMPLES)]


def _cuts(units: list[str], joint: str) -> Iterator[tuple[str, str]]:
    """Contexts and continuations of a text in units, one after the other."""
    start, length = 0, 0
    for place, unit in enumerate(units):
        length += len(unit) + len(joint)
        if length < _CONTEXT:
            continue
        end, size = place + 1, 0
        while end < len(units) and size < _CONTINUATION:
            size += len(units[end]) + len(joint)
            end += 1
        if size >= _CONTINUATION:
            yield joint.join(units[start : place + 1]), joint + joint.join(units[place + 1 : end])
        start, length = place + 1, 0


def _among_others(pieces: list[tuple[str, str]]) -> list[Sample]:
    """Each context with its continuation among three of others, in random order."""
    draw = random.Random(0)
    samples = []
    for context, true in pieces:
        others = draw.sample([continuation for _, continuation in pieces if continuation != true], CHOICES - 1)
        samples.append(_choice(context, true, others, draw))
    return _some(samples)


def _choice(context: str, true: str, others: list[str], draw: random.Random) -> Sample:
    choices = [true, *others]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(true)}


def _some(samples: list[Sample]) -> list[Sample]:
    """:data:`SAMPLES` of them, in random order."""
    random.Random(0).shuffle(samples)
    return samples[:SAMPLES]


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def _sum(draw: random.Random) -> Sample:
    sign = draw.choice(list(_OPERATIONS))
    most = 9 if sign == "*" else 49
    lines, result = [], 0
    for _ in range(5):  # the last one is the question
        small, large = sorted((draw.randint(1, most), draw.randint(1, most)))
        result = _OPERATIONS[sign](large, small)
        lines.append(f"{large} {sign} {small} = {result}")
    near = [result + shift for shift in (-10, -2, -1, 1, 2, 10) if result + shift >= 0]
    others = [f" {value}" for value in draw.sample(near, CHOICES - 1)]
    context = "\n".join(lines).rpartition(" ")[0]
    return _choice(context, f" {result}", others, draw)


_KEYS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
_THINGS = ("door", "box", "car", "house", "book", "lamp")


def _pairs(draw: random.Random) -> Sample:
    names = draw.sample([f"{key} {thing}" for key in _KEYS for thing in _THINGS], 16)
    values = [f" {value}" for value in draw.sample(range(100, 1000), 16)]
    asked, *rest = draw.sample(range(16), CHOICES)
    lines = [f"The number of the {name} is{value}." for name, value in zip(names, values, strict=True)]
    context = "\n".join([*lines, f"The number of the {names[asked]} is"])
    return _choice(context, values[asked], [values[i] for i in rest], draw)


TASKS: dict[str, Callable[[], list[Sample]]] = {
    f"{LOCAL}_{make.__name__}": make for make in (last_word, article, function, arithmetic, recall)
}
"""The function that makes the samples of each task, by its name."""


def samples_sha256(name: str) -> str:
    """The SHA-256, in hex, of a task's samples."""
    return hashlib.sha256(json.dumps(TASKS[name]()).encode()).hexdigest()


def task_of(name: str) -> dict[str, Any]:
    """The configuration of a task for lm-eval."""

    def data(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # slow to import

        return {"test": Dataset.from_list(TASKS[name]())}

    metric = {"aggregation": "mean", "higher_is_better": True}
    found = {
        "task": name,
        "custom_dataset": data,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", **metric}],
    }
    if name == f"{LOCAL}_{last_word.__name__}":
        return {**found, "output_type": "loglikelihood", "doc_to_target": "{{target}}"}
    return {**found, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
