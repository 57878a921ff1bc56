"""``ace-prune bench`` of one packed folder: measurements, table, plot, bad input."""

import io
import json
import math
import re
import signal
import sys

import matplotlib.colors
import matplotlib.image
import pytest
import torch
from folders import prune, save_dense, spawn

from ace_ext import InputError
from ace_ext.bench.pair import BenchResult, Difference, Pair, bench, pair_steps
from ace_ext.bench.settings import BenchProgress, BenchSettings
from ace_ext.cli.bench import table
from ace_ext.cli.main import main
from ace_ext.packed.files import SUFFIX
from ace_ext.packed.packing import pack
from ace_ext.reporting.bench_plot import _pairs, check_plot, pair_plot
from ace_ext.reporting.plots import DPI, WIDTH


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """``(pruned, packed)`` folders."""
    place = tmp_path_factory.mktemp("llama")
    dense = save_dense(place / "dense", dtype=torch.float32)
    prune(dense, place / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(place / "pruned", place / "packed", "bitmap", None)
    return place / "pruned", place / "packed"


def test_bench_measures_both(llama, tmp_path, capsys):
    pruned, packed = llama
    options = ["--tokens", "2", "--rounds", "1", "--prefill", "20", "--quiet", "--plot", str(tmp_path / "plot.png")]
    before = sorted(packed.parent.iterdir())
    assert main(["bench", str(packed), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(packed.parent.iterdir()) == before  # the dense folder that it unpacked is gone
    assert list(found["decode"]) == ["1", "4", "16"]
    for pair in (*found["decode"].values(), found["prefill"], found["load"]):
        assert pair["dense"] > 0
        assert pair["packed"] > 0
    assert found["files"]["dense"] == (pruned / "model.safetensors").stat().st_size
    assert found["files"]["packed"] == next(packed.glob(f"*{SUFFIX}")).stat().st_size
    logits = found["logits"]
    assert math.sqrt(logits["squares"] / logits["spread"]) < 1e-5  # float32
    assert 0 <= logits["largest"] < 1e-4
    assert found["rounding"] is None  # nothing is wider than float32
    check_plot(tmp_path / "plot.png")  # may be replaced
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[1] == round(WIDTH * DPI)
    shown = table(BenchResult(str(pruned), str(packed), "float32", 1, "AVX2", 1, {16: Pair(10.0, 15.0, 1.5)}))
    assert shown.splitlines()[2].split() == ["decode,", "batch", "16:", "tokens/s", "10", "15", "1.50", "x"]
    assert shown.endswith("1 thread, AVX2; 1 run each, alternating")


def test_more_tokens_than_a_model_has_positions():
    settings = BenchSettings(prompt=8, tokens=16, prefill=512)
    assert settings.prefill_within(None) == 512
    assert settings.prefill_within(24) == 24
    with pytest.raises(InputError, match=r"^tokens: 16 after a prompt of 8 found, but the model has 23 positions"):
        settings.prefill_within(23)


@pytest.fixture
def no_loads(monkeypatch):
    """Loads in separate processes take most of the time of a short run."""
    monkeypatch.setattr("ace_ext.bench.pair._in_a_process", lambda _: (1.0, 1.0))


@pytest.mark.usefixtures("no_loads")
def test_bench_compares_the_difference_of_logits_with_rounding(tmp_path, capsys):
    """Each product is rounded to bfloat16, so the order of its sums shows; the model's own rounding gives the scale."""
    prune(save_dense(tmp_path / "dense"), tmp_path / "pruned")
    assert main(["pack", str(tmp_path / "pruned"), "--output", str(tmp_path / "packed")]) == 0
    options = ["--tokens", "2", "--rounds", "1", "--prefill", "20", "--quiet"]
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "packed"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = [float(re.search(r"differ by (\S+) % of their standard deviation", line)[1]) for line in lines[-3:-1]]
    assert lines[-2].startswith("for scale: dense in bfloat16 and in float32 differ")
    assert 0 <= shares[0] < 2 * shares[1]
    assert 0.1 < shares[1] < 5


def test_difference():
    reference, found = torch.randn(2, 3, 50), Difference()
    other = reference + 0.01 * torch.randn(2, 3, 50)
    found.add(reference, other)
    expected = (other - reference).square().mean().sqrt() / reference.var(dim=-1, correction=0).mean().sqrt()
    assert found.relative == pytest.approx(float(expected), rel=1e-4)
    assert found.largest == pytest.approx(float((other - reference).abs().max()))


@pytest.mark.usefixtures("no_loads")
def test_bench_counts_its_steps(llama):
    pruned, packed = llama
    settings, steps, phases = BenchSettings(tokens=1, rounds=1, prefill=4, batches=(1, 2)), [], []
    bench(str(pruned), str(packed), settings, BenchProgress(phases.append, lambda: steps.append(1)))
    assert len(steps) == pair_steps(settings) == 2 * 2 + 3 * 2 * 2
    assert phases[-1] == "prefill of 4 tokens"


def test_sigterm_leaves_no_temporary_files(llama):
    _, packed = llama
    before = sorted(packed.parent.iterdir())
    child = spawn([sys.executable, "-m", "ace_ext", "bench", str(packed), "--tokens", "40", "--rounds", "1000"])
    for line in child.stderr:
        if "loading each model" in line:
            break
    assert sorted(packed.parent.iterdir()) != before
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert sorted(packed.parent.iterdir()) == before


def test_bench_refuses_what_it_cannot_measure(llama, tmp_path, capsys):
    pruned, packed = llama
    assert main(["bench", str(pruned)]) == 2
    assert "is not packed" in capsys.readouterr().err
    assert main(["bench", str(packed), "--dense", str(pruned), "--tokens", "0"]) == 2
    assert "tokens must be positive" in capsys.readouterr().err
    assert main(["bench", str(packed), "--dense", str(packed), "--quiet"]) == 2
    assert "dense must be the folder that was packed" in capsys.readouterr().err
    assert main(["bench", str(packed), "--dense", str(tmp_path / "none")]) == 2
    assert "none' is not a folder" in capsys.readouterr().err
    assert main(["bench", str(packed), "--plot", str(tmp_path / "plot.txt")]) == 2
    assert "plot must end in .png" in capsys.readouterr().err
    (tmp_path / "other.png").write_bytes(b"\x89PNG of someone else")
    assert main(["bench", str(packed), "--plot", str(tmp_path / "other.png")]) == 2
    assert "is not a plot of ace-prune bench" in capsys.readouterr().err


def test_the_plot_shows_every_figure():
    worse, better = Pair(1.0, 2.0, 0.5), Pair(2.0, 1.0, 2.0)
    result = BenchResult("d", "p", "bfloat16", 1, "AVX2", 3, {1: better, 16: worse}, 512, worse, better, better, better)
    assert list(_pairs(result)) == [
        "decode, batch 1",
        "decode, batch 16",
        "prefill, 512 tokens",
        "time to load",
        "resident memory",
        "weight files",
    ]
    image = matplotlib.image.imread(io.BytesIO(pair_plot(result)))[..., :3]
    for colour in ("#0072b2", "#d55e00"):  # bars of both kinds
        found = abs(image - matplotlib.colors.to_rgb(colour)).max(axis=2) < 0.01
        assert found.mean() > 0.01
