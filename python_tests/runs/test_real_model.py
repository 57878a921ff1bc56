"""SmolLM2-135M from its GGUF file to a pruned folder and back. Fetched once, into demo/ or $ACE_MODEL_FOLDER."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from helpers import ROOT, script

from ace_ext import PruneConfig
from ace_ext.data.perplexity import perplexity
from ace_ext.data.windows import evaluation_tokens
from ace_ext.models.loading import load_model
from ace_ext.runs.options import Calibration, RunOptions
from ace_ext.runs.pipeline import prune_folder
from ace_ext.runs.verify import verify

BLOCKS = 5
"""Of 30: what a run holds at its peak, with all weights in memory or without, does not need more to be seen."""


pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def gguf() -> Path:
    return script("tools/fetch_models.py").fetch(Path(os.environ.get("ACE_MODEL_FOLDER", ROOT / "demo")))


@pytest.fixture(scope="module")
def loaded(gguf):
    """The dense model; reading the file takes ten seconds and more."""
    return load_model(str(gguf))


def test_gguf_in_safetensors_out(gguf, tmp_path, monkeypatch):
    calibration = Calibration("wiki-mini", nsamples=16, seqlen=64)
    reads, read = [], GGUFReader.__init__
    monkeypatch.setattr(GGUFReader, "__init__", lambda self, *given: reads.append(given) or read(self, *given))
    _, out = prune_folder(
        str(gguf), tmp_path / "out", PruneConfig("wanda"), calibration, RunOptions(), torch.device("cpu")
    )
    assert len(reads) == 1  # four by transformers alone

    result = verify(out)
    assert not result.problems
    assert result.matrices == 210
    assert result.exact_rows == result.rows == 30 * (576 * 3 + 192 * 2 + 1536 * 2)
    again = load_model(str(out))  # a plain folder now: no GGUF, no quantization marks
    assert again.model.dtype == torch.bfloat16
    assert not hasattr(again.model.config, "quantization_config")
    pruned = perplexity(again.model, evaluation_tokens("wiki-mini", again.tokenizer)[:1024]).perplexity
    # Measured on these 2 windows: dense 13.9, pruned 36.4. Magnitude costs ten times the dense.
    assert 28 < pruned < 45


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory) -> Path:
    """The first blocks of the same model, as safetensors."""
    path = tmp_path_factory.mktemp("smollm2") / "dense"
    config = copy.deepcopy(loaded.model.config)
    config.num_hidden_layers = BLOCKS
    shorter = type(loaded.model)(config).to(loaded.model.dtype)
    tensors = loaded.model.state_dict()
    shorter.load_state_dict({name: tensors[name] for name in shorter.state_dict()})
    shorter.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


def peak_memory(command: str, model: Path, *options: str) -> int:
    """Peak memory in bytes, planned or measured, from a separate process."""
    arguments = [command, "--model", str(model), "--calibration", "wiki-mini", "--nsamples", "8", "--seqlen", "64"]
    call = [sys.executable, "-m", "ace_ext", *arguments, "--device", "cpu", "--json", *options]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir())
    return json.loads(done.stdout)["peak_memory_bytes"]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gguf", "memory", "disk"])
def test_planned_peak_is_the_runs(kind, gguf, folder, tmp_path):
    """Within 15 %: what benchmarks/plan_accuracy.py shows for more settings."""
    model = gguf if kind == "gguf" else folder
    options = ["--offload", "disk", "--max-memory", "2GB"] if kind == "disk" else ["--offload", "none"]
    planned = peak_memory("plan", model, *options)
    measured = peak_memory("run", model, *options, "--output", str(tmp_path / "out"))
    assert planned == pytest.approx(measured, rel=0.15)
