"""Runs with arguments drawn at random. What a run accepts, its plan accepts too, ``verify`` finds as reported, and
``unpack`` and ``pack`` write again; what it refuses is one line, and there is no output."""

import contextlib
import io
import tempfile
from pathlib import Path

import pytest
import torch
from folders import save_dense, weights_bytes
from helpers import rest_nightly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ace_ext.cli.main import main
from ace_ext.packed import CODECS

FAMILIES = ("llama", "opt", "gemma3", "mixtral", "olmoe", "deepseek-v3")
DTYPES = ("float32", "float16", "bfloat16")

ORDERS = ("collect(order=block)", "collect(order=sequential)", "collect(batch_tokens=32)")
SCORES = ("magnitude", "wanda", "ria", "stade", "cosp", "ace", "norm-cosvar")
SWAPS = ("swaps", "mean-swaps", "dsnot")
SOLVES = ("admm", "obs", "alps", "thanos", "mean-update", "admm(gram=plain)", "admm(gram=cosine)")
ROUNDS = ("quantize(bits=4, group=64)", "quantize(bits=8, embeddings=8)", "quantize(bits=3, group=64)")
TRAINS = ("train(epochs=1)", "distill(tokens=64)", "train(epochs=1) + distill(tokens=64)")
NAMED = ("fast", "balanced", "published-wanda", "published-sparsegpt", "published-dsnot", "published-thanos")
REMOVALS = ("neurons=0.34(multiple=8)", "blocks=1", "heads=0.5", "experts=0.5", "neurons=0.5(multiple=8) + blocks=1")


def maybe(values):
    """One of the values, or an empty text, which is drawn as often as all of them."""
    return st.one_of(st.just(""), st.sampled_from(values))


STAGES = st.tuples(
    *(maybe(values) for values in (ORDERS, ("allocate",), SCORES, SWAPS, SOLVES, ROUNDS)), maybe(TRAINS)
).map(lambda parts: " + ".join(filter(None, parts)) or "fast")

OPTIONS = {
    "--method": st.one_of(st.sampled_from(NAMED), STAGES),
    "--sparsity": maybe(("0", "0.3", "0.7", "0.99")),
    "--pattern": maybe(("2:4", "1:4", "4:8")),
    "--remove": maybe(REMOVALS),
    "--format": maybe((*CODECS, "compressed-tensors")),
    "--group": maybe(("row", "matrix", "model")),
    "--skip": maybe(("down_proj$", r"layers\.0\.")),
    "--offload": maybe(("disk",)),
    "--nsamples": st.sampled_from(("1", "4", "8")),
    "--seqlen": st.sampled_from(("2", "8", "16")),
}
SELDOM = ("--remove", "--group", "--skip", "--offload")
"""Options that are drawn one at a time, at most: together they are mostly refused."""


@st.composite
def arguments(draw):
    """``(family, dtype, arguments of the run)``."""
    one = draw(maybe(SELDOM))
    given_options = {name: draw(values) for name, values in OPTIONS.items() if name not in SELDOM or name == one}
    if given_options["--sparsity"] and given_options["--pattern"]:
        del given_options["--pattern"]
    words = [word for name, value in given_options.items() if value for word in (name, value)]
    return draw(st.sampled_from(FAMILIES)), draw(st.sampled_from(DTYPES)), words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    for family in FAMILIES:
        for dtype in DTYPES:
            save_dense(folder / f"{family}-{dtype}", family, getattr(torch, dtype))
    return folder


def called(*words):
    """Status and stderr of a call of the command line."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        status = main([*map(str, words)])
    return status, error.getvalue()


def succeeds(*words):
    status, error = called(*words)
    assert status == 0, (words, error)


def check(place, drawn):
    family, dtype, words = drawn
    inputs = ["--model", place / f"{family}-{dtype}", "--calibration", place / "text.txt", *words]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, error = called("run", *inputs, "--output", folder / "out", "--quiet")
        if status != 0:
            assert (status, error.count("\n")) == (2, 1), error
            assert error.startswith("ace-prune"), error
            left = {path.name for path in folder.iterdir()}
            assert all(name.endswith(".unfinished") for name in left)  # a run that began can be resumed
            return
        succeeds("verify", folder / "out")
        succeeds("plan", *inputs)
        form = dict(zip(words[::2], words[1::2], strict=True)).get("--format")
        if form in CODECS:
            succeeds("unpack", folder / "out", "--output", folder / "dense")
            succeeds("verify", folder / "dense")
            status, error = called("pack", folder / "dense", "--output", folder / "again", "--format", form)
            assert status == 0 or "has enough zeros" in error  # a run may write such a model
            assert status != 0 or weights_bytes(folder / "again") == weights_bytes(folder / "out")


@pytest.mark.parametrize("count", rest_nightly([40], [40, 2000]))
def test_random_runs(count, place):
    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(arguments())
    def each(drawn):
        check(place, drawn)

    each()
