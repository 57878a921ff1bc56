"""``ace-prune bench`` of several candidates: turns, table, plot, bad input; llama.cpp itself runs in `make nightly`."""

import importlib.util
import io
import json
import shutil
import signal
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import transformers
from folders import prune, save_dense, spawn
from tiny_models import make_tokens
from transformers import AutoModelForCausalLM

from ace_ext import InputError, prune_model
from ace_ext.bench.candidates import Candidate, engines_of, folder_candidates, gguf_sources
from ace_ext.bench.contest import (
    ContestResult,
    Figures,
    _beside,
    _check_measured,
    _turns,
    check_shapes,
    contest,
    contest_steps,
    gguf_candidates,
    vllm_candidates,
)
from ace_ext.bench.gguf_writer import write_gguf
from ace_ext.bench.settings import BenchProgress, BenchSettings
from ace_ext.bench.worker import Worker
from ace_ext.cli.bench import contest_table
from ace_ext.cli.main import main
from ace_ext.packed.packing import pack
from ace_ext.process_threads import without_own_waiting
from ace_ext.reporting.bench_plot import contest_plot

SHORT = ("--tokens", "2", "--rounds", "1", "--prefill", "20")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``(pruned, packed as bitmap, packed as archive)``."""
    place = tmp_path_factory.mktemp("contest")
    dense = save_dense(place / "dense")
    prune(dense, place / "pruned", calibration={"source": "tokens"}, method="magnitude")
    for codec in ("bitmap", "archive"):
        pack(place / "pruned", place / codec, codec, None)
    return place / "pruned", place / "bitmap", place / "archive"


@pytest.fixture
def installed(monkeypatch):
    """As if xllamacpp were installed; nothing imports it."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xllamacpp" or found(name))


def test_two_packed_folders(folders, tmp_path, capsys):
    dense, *packed = folders
    plot = tmp_path / "plot.png"
    arguments = ["bench", *map(str, packed), "--dense", str(dense), *SHORT, "--plot", str(plot), "--quiet", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [own["name"] for own in found["figures"]] == ["dense", "bitmap", "archive"]
    weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(dense).parameters())
    for own, folder in zip(found["figures"], folders, strict=True):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert own["file_bytes"] == size
        assert own["bits"] == pytest.approx(8 * size / weights)
        assert list(own["decode"]) == ["1", "4", "16"]
        assert min(*own["decode"].values(), own["prefill"]) > 0
        assert own["memory_bytes"] > own["program_bytes"] > 10**7
        assert own["engine"].startswith(f"torch {torch.__version__}")
    assert set(found["figures"][0]["decode_ratios"].values()) == {1.0}
    assert (found["dtype"], found["prefill_tokens"]) == ("bfloat16", 20)
    assert matplotlib.image.imread(plot).ndim == 3


def test_candidates_take_turns():
    """In each round everyone runs once, and each round starts with the next one. The first round is not counted."""
    order, steps = [], []

    def run(worker):
        order.append(worker)
        return float(len(order))

    seconds = _turns(["a", "b", "c"], 3, lambda: steps.append(1), run)
    assert "".join(order) == "abcbcacababc"
    assert seconds == [[6.0, 8.0, 10.0], [4.0, 9.0, 11.0], [5.0, 7.0, 12.0]]
    assert len(steps) == 12


@pytest.fixture(scope="module")
def smaller(folders):
    """A folder without a quarter of the neurons."""
    folder = shutil.copytree(folders[0], folders[0].parent / "smaller")
    model = AutoModelForCausalLM.from_pretrained(folder)
    prune_model(model, make_tokens(8, 16), remove="neurons=0.25(refit=none)")
    model.save_pretrained(folder)
    return folder


def test_a_smaller_folder_and_the_number_of_steps(folders, smaller):
    settings, steps, phases = BenchSettings(tokens=1, rounds=1, prefill=4, batches=(2,)), [], []
    progress = BenchProgress(phases.append, lambda: steps.append(1))
    dense, own = contest(folders[0], [Candidate("b", smaller, beside="dense")], settings, progress).figures
    assert (dense.beside, own.beside, dense.beside_decode) == ("", "dense", {})
    assert own.beside_decode == own.decode_ratios
    assert own.beside_prefill == own.prefill_ratio > 0
    assert len(steps) == contest_steps(2, settings) == 2 * (1 + 2 * 2)
    assert phases == ["loading dense", "loading b", "decoding, batch 2", "prefill of 4 tokens"]


def test_candidates_of_a_smaller_folder(folders, smaller, tmp_path):
    dense, bitmap, _ = folders
    packed, own = folder_candidates([str(bitmap), str(smaller)])
    assert (packed.beside, own.beside) == ("", "dense")
    check_shapes(dense, [packed, own])
    found = gguf_candidates(dense, ["q8_0"], tmp_path, smaller=[own])
    names = [(one.name, one.beside) for one in found]
    assert names == [("llama.cpp q8_0", ""), ("llama.cpp q8_0 smaller", "llama.cpp q8_0")]
    assert found[0].file_bytes() > found[1].file_bytes()
    served = [(one.name, one.path, one.beside) for one in vllm_candidates(dense, [own])]
    assert served == [("vllm dense", dense, ""), ("vllm smaller", smaller, "vllm dense")]


def figures(name, speed, engine="torch 2"):
    return Figures(name, engine, 10**6, 8.5, 10, 2 * 10**6, {1: speed}, {1: speed / 10}, 40.0, 4.0)


def test_times_within_the_noise_are_an_error():
    measured = [figures("dense", 1.0), figures("vllm dense", 1.0)]
    _check_measured(measured, [[0.1, 0.2, 0.3], [-0.1, 0.1, 0.2]], "")
    with pytest.raises(InputError, match=r"vllm dense: 4 tokens at batch 1 took less time than .* raise --tokens"):
        _check_measured(measured, [[0.1, 0.2, 0.3], [-0.1, 0.1, -0.2]], "4 tokens at batch 1")


def test_speed_beside_the_dense_model_in_the_same_engine():
    result = ContestResult("bfloat16", 2, 3, 16, 512)
    result.figures = [figures(name, 1.0) for name in ("dense", "s", "llama.cpp q8_0", "llama.cpp q8_0 s")]
    result.figures[1].beside, result.figures[3].beside = "dense", "llama.cpp q8_0"
    seconds = [[4.0, 4.0, 4.0], [2.0, 4.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
    assert _beside(result, seconds) == {1: 2.0, 3: 2.0}


def test_table_and_plot():
    result = ContestResult("bfloat16", 2, 3, 16, 512)
    result.figures = [
        figures("dense", 10.0),
        figures("packed", 15.0),
        figures("llama.cpp q8_0", 5.0, "llama.cpp, AVX2"),
    ]
    lines = contest_table(result).splitlines()
    assert lines[4].split() == ["packed", "15", "(1.50)", "40", "(4.00)", "8.50", "1", "2"]
    assert lines[-3:] == [
        "torch 2: dense, packed",
        "llama.cpp, AVX2: llama.cpp q8_0",
        "dense is bfloat16; 2 threads; medians of 3 runs each, alternating",
    ]
    result.figures[1].beside, result.figures[1].beside_decode = "dense", {1: 1.5, 4: 1.1}
    line = "packed beside dense: decodes 1.50 at batch 1, 1.10 at batch 4 times as fast, prefill 1.00"
    assert contest_table(result).splitlines()[-2] == line
    image = matplotlib.image.imread(io.BytesIO(contest_plot(result)))
    assert image.shape[0] > image.shape[1] / 2


def test_spelling(installed, tmp_path):
    assert gguf_sources([]) == []
    assert gguf_sources(["llama.cpp"]) == ["bf16", "q8_0", "q4_0"]
    assert gguf_sources(["llama.cpp:Q8_0, llama.cpp:bf16", "llama.cpp:q8_0"]) == ["q8_0", "bf16"]
    (tmp_path / "own.gguf").write_bytes(b"GGUF of another kind")
    assert engines_of(["llama.cpp:q8_0"]) == (["q8_0"], False)
    for wrong in ("vllm", "llama.cpp:q5", "llama.cpp:", "", "llama.cpp:bf16,"):
        with pytest.raises(InputError, match=r"against must be llama\.cpp or of llama\.cpp:bf16, "):
            gguf_sources([wrong])
    with pytest.raises(InputError, match="is not a file; check the path"):
        gguf_sources([f"llama.cpp:{tmp_path}/none.gguf"])
    with pytest.raises(InputError, match=r"own\.gguf"):
        gguf_sources([f"llama.cpp:{tmp_path}/own.gguf"])


@pytest.mark.usefixtures("installed")
def test_a_file_of_another_model(folders, tmp_path, capsys):
    dense, bitmap, _ = folders
    other = save_dense(tmp_path / "other", "llama-tied")
    write_gguf(other, tmp_path / "other.gguf", "bf16")
    arguments = [
        "bench",
        str(bitmap),
        "--dense",
        str(dense),
        "--against",
        f"llama.cpp:{tmp_path}/other.gguf",
        "--quiet",
    ]
    assert main(arguments) == 2
    assert "weights, the dense folder" in capsys.readouterr().err


def test_names_of_folders(tmp_path):
    for name in ("a/packed", "b/packed", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    found = folder_candidates([str(tmp_path / name) for name in ("a/packed", "b/packed", "b/other")])
    assert [one.name for one in found] == [str(tmp_path / "a/packed"), str(tmp_path / "b/packed"), "other"]
    with pytest.raises(InputError, match="given twice"):
        folder_candidates([str(tmp_path / "b/other"), str(tmp_path / "b/../b/other")])


def test_bad_input(folders, tmp_path, capsys, monkeypatch):
    dense, bitmap, archive = map(str, folders)
    before = sorted(folders[1].parent.iterdir())

    def error(*arguments):
        assert main(["bench", *arguments, "--quiet"]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "is not packed" in error(bitmap, dense)
    assert "given twice" in error(bitmap, bitmap, "--dense", dense)
    assert "against must be" in error(bitmap, "--against", "vlm")
    assert "against vllm needs vLLM" in error(bitmap, "--against", "vllm")
    with monkeypatch.context() as absent:
        absent.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install 'ace_ext[llama]'" in error(bitmap, "--against", "llama.cpp:bf16")
    assert "the dense folder too (--dense)" in error(dense)
    other = save_dense(tmp_path / "other", "qwen2")
    assert "models of the same type and vocabulary" in error(str(other), "--dense", dense)
    assert "has model_type llama, the dense folder qwen2" in error(bitmap, archive, "--dense", str(other))
    assert sorted(folders[1].parent.iterdir()) == before


@pytest.mark.usefixtures("installed")
def test_a_model_that_llama_cpp_cannot_be_given(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense", "opt")
    prune(dense, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(tmp_path / "pruned", tmp_path / "packed", "bitmap", None)
    assert main(["bench", str(tmp_path / "packed"), "--against", "llama.cpp:bf16", "--quiet"]) == 2
    assert "a model of class OPTForCausalLM: only LlamaForCausalLM" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_fails(folders, tmp_path):
    with Worker(Candidate("one", folders[1]), 1) as worker:
        worker.load(8)
        with pytest.raises(InputError, match=r"one could not be measured: .*IndexError"):
            worker.prefill([10**6])
        assert worker.prefill([1]) > 0
        worker._process.kill()
        with pytest.raises(InputError, match="ended with status -9; is there enough memory"):
            worker.prefill([1])
    with pytest.raises(InputError, match="could not be measured"):
        Worker(Candidate("none", tmp_path / "none"), 1)


def test_the_process_of_another_engine_does_not_inherit_how_threads_wait():
    own = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", "HOME": "/"}
    assert without_own_waiting(own) == {"HOME": "/"}
    theirs = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "5000"}
    assert without_own_waiting(theirs) == theirs


def test_sigterm_ends_the_processes(folders, smaller):
    command = [sys.executable, "-m", "ace_ext", "bench", str(smaller), "--dense", str(folders[0]), "--rounds", "1000"]
    child = spawn(command)
    for line in child.stderr:
        if "decoding" in line:
            break
    children = [
        Path(f"/proc/{pid}") for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert not any(process.exists() for process in children)


# With xllamacpp, which `make nightly` installs


def save_gemma3(folder):
    """Of the pattern of layers that llama.cpp expects."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    config = transformers.Gemma3TextConfig(**size, **heads, vocab_size=64, sliding_window=8)
    model = transformers.Gemma3ForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" in name else 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3"])
def test_llama_cpp_chooses_the_tokens_of_transformers(family, tmp_path):
    """Each token's logit by transformers in float32 is the largest, but for the error that transformers itself has in
    bfloat16 there (llama.cpp rounds inputs to bfloat16 too). Without the order of rows of q and k that llama.cpp
    expects, or without a bias, it is lower by many times that error."""
    dense = save_gemma3(tmp_path / "dense") if family == "gemma3" else save_dense(tmp_path / "dense", family)
    write_gguf(dense, tmp_path / "model.gguf", "bf16")
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    with Worker(Candidate("llama", tmp_path / "model.gguf", "llama.cpp"), 1) as worker, torch.inference_mode():
        for seed in range(6):
            prompt = torch.randint(3, 64, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
            found = worker.generate(prompt, 12)
            assert len(found) == 12
            logits, others = (
                model(torch.tensor([prompt + found])).logits[0, 11:-1].float() for model in (exact, rounded)
            )
            error = (logits - others).abs().max()
            logits[:, 2] = -torch.inf  # the end of a text, which llama.cpp does not choose here
            below = logits.max(dim=-1).values - logits.gather(1, torch.tensor(found)[:, None])[:, 0]
            assert below.max() <= error
            assert error < logits[:, 3:].std() / 4


@pytest.mark.nightly
def test_bench_against_llama_cpp(folders, capsys):
    dense, bitmap, archive = folders
    before = sorted(bitmap.parent.iterdir())
    arguments = ["bench", str(bitmap), str(archive), "--dense", str(dense), "--against", "llama.cpp", *SHORT, "--quiet"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    assert [own["name"] for own in found[3:]] == ["llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0"]
    for own in found[3:]:
        assert own["engine"].startswith("llama.cpp of xllamacpp")
        assert min(*own["decode"].values(), own["prefill"]) > 0
        assert own["memory_bytes"] > own["program_bytes"] > 10**6
    assert found[3]["bits"] > found[4]["bits"] > found[5]["bits"]
    assert sorted(bitmap.parent.iterdir()) == before


@pytest.mark.nightly
def test_bench_against_a_file_of_the_user(folders, tmp_path, capsys):
    dense, bitmap, _ = folders
    write_gguf(dense, tmp_path / "own.gguf", "q8_0")
    own = ["--against", f"llama.cpp:{tmp_path}/own.gguf, llama.cpp:bf16"]
    assert main(["bench", str(bitmap), "--dense", str(dense), *own, *SHORT, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:7]] == ["dense", "bitmap", "llama.cpp own.gguf", "llama.cpp bf16"]
