"""A tiny random model of every encoder, encoder-decoder, vision, speech and contrastive class is pruned.

    pytest -s -m nightly python_tests/models/test_other_families.py

prints what becomes of each, as ``test_families.py`` does of causal language models.
"""

import re
import signal
import tempfile
from collections import Counter
from contextlib import contextmanager

import other_classes
import pytest
import torch
from class_checks import NOT_BUILT, OK, PARTLY, REFUSED, Row, check_weights
from torch import Tensor, nn

from ace_ext import InputError, PruneConfig, prune_model

SECONDS = 60
"""A class that takes longer is an error of its own, and no other class waits for it."""
ASKED = 3
"""So often a class is asked for again with what the message says."""
MANY = 135
"""At least so many classes prune without being asked for more."""


@contextmanager
def limited():
    """Raises TimeoutError if its body takes longer than ``SECONDS``."""

    def stop(*_):
        raise TimeoutError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(first, second, strict=True)
    )


def row_of(model_type: str) -> Row:
    """Builds and prunes one class, and checks what was done to its weights."""
    if model_type in other_classes.CANNOT:
        return Row(NOT_BUILT, other_classes.CANNOT[model_type])
    try:
        model = other_classes.build(model_type)
        inputs = other_classes.inputs_of(model)
        dense = other_classes.outputs_of(model, inputs)
    except TimeoutError:
        raise
    except Exception as error:  # a class may need more than a small configuration
        return Row(NOT_BUILT, f"{type(error).__name__}: {error}")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    words, more = "", {}
    for _ in range(ASKED):
        try:
            report = prune_model(model, inputs, PruneConfig("wanda", sparsity=0.0, **more))
            break
        except InputError as error:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "changed, then refused"
            wanted = asked_for(str(error))
            if not wanted or wanted.items() <= more.items():
                return Row(REFUSED, str(error))
            words, more = words or str(error), more | wanted
    else:
        return Row(REFUSED, words)
    assert same(other_classes.outputs_of(model, inputs), dense), "sparsity 0 changes the outputs"
    report = prune_model(model, inputs, PruneConfig("wanda", **more))
    check_weights(model, before, report)
    check_saved(model, inputs)
    left = sum(weight.size for weight in report.dense)
    share_left = left / (left + sum(matrix.size for matrix in report.matrices))
    return Row(PARTLY if words else OK, words, share_left, report)


def asked_for(words: str) -> dict[str, object]:
    """The settings by which an error message says that a model is pruned in part."""
    share, skipped = re.search(r"--max-dense ([\d.]+)", words), re.search(r"skip='([^']+)'", words)
    if share is not None:
        return {"max_dense": float(share[1])}
    return {} if skipped is None else {"skip": skipped[1]}


def check_saved(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """What is saved and loaded has the same weights and outputs."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    loaded = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), f"{name}: is loaded with other values"
    for tensor in (*again.parameters(), *again.buffers()):
        tensor.data = tensor.data.clone()  # in the file they begin at odd addresses, where products round otherwise
    assert same(other_classes.outputs_of(again, inputs), other_classes.outputs_of(model, inputs)), (
        "the loaded model has other outputs"
    )


@pytest.mark.nightly
def test_the_table():
    """Most classes are ok; none is an error or pruned in part unsaid."""
    counts: Counter[str] = Counter()
    errors = []
    print()
    for model_type, (kind, name) in other_classes.classes().items():
        try:
            with limited():
                row = row_of(model_type)
        except Exception as error:
            errors.append(model_type)
            row = Row("ERROR", f"{type(error).__name__}: {error}")
        counts[row.fate] += 1
        words = " ".join(row.words.split())[:200]
        print(f"{kind:<16} {model_type:<28} {name:<44} {row.fate:<13} {row.dense:6.1%}  {words}", flush=True)
    print(", ".join(f"{count} {fate}" for fate, count in counts.items()))
    assert not errors
    assert counts[OK] >= MANY
