"""Packed folders served by vLLM: `vllm serve`, an OpenAI client, and the text that transformers' packed model writes.

Needs an environment with vLLM; ``make check-vllm`` makes one and runs these tests. SmolLM2-135M is fetched once, into
demo/ or $ACE_MODEL_FOLDER; the packed models are kept in $ACE_VLLM_FOLDERS for the next call. All models compute in
float32: in bfloat16 the kernels of vLLM and of transformers round differently, and greedy texts part where two words
are nearly equal.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, script
from transformers import AutoModelForCausalLM, AutoTokenizer

from ace_ext import register
from ace_ext.packed.files import SUFFIX, PackedShards
from ace_ext.packed.packing import pack, unpack

VLLM = Path(sys.executable).with_name("vllm")
WAIT = float(os.environ.get("ACE_VLLM_WAIT", "900"))
"""Seconds until a server answers; a compiled model takes minutes on a busy machine."""
TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "Once upon a time, a small dog",
    "Water boils at",
    "def add(a, b):",
    "The three primary colours are",
    "In 1969, the first man",
    "To make bread you need",
    "My favourite season is",
]

pytestmark = [pytest.mark.vllm, pytest.mark.network]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Where packed models are."""
    kept = os.environ.get("ACE_VLLM_FOLDERS")
    return Path(kept).absolute() if kept else tmp_path_factory.mktemp("packed")


def packed(model: Path, folder: Path, method: str = "fast") -> Path:
    """The packed model, pruned to 50 %."""
    options = ["--method", method, "--calibration", "wiki-mini", "--nsamples", "16", "--seqlen", "128"]
    call = [sys.executable, "-m", "ace_ext", "run", "--model", model, "--output", folder, "--format", "bitmap"]
    subprocess.run([*map(str, call), *options], check=True, cwd=tempfile.gettempdir())
    return folder


@pytest.fixture(scope="module")
def gguf() -> Path:
    return script("tools/fetch_models.py").fetch(Path(os.environ.get("ACE_MODEL_FOLDER", ROOT / "demo")))


@pytest.fixture(scope="module")
def smol(gguf, folders) -> Path:
    return folders / "smol" if (folders / "smol").exists() else packed(gguf, folders / "smol")


@pytest.fixture(scope="module")
def mixture(gguf, folders, tmp_path_factory) -> Path:
    if not (folders / "mix").exists():
        dense = tmp_path_factory.mktemp("mixture") / "dense"
        script("tools/make_mixture.py").make(str(gguf), dense, 2)
        packed(dense, folders / "mix")
    return folders / "mix"


@pytest.fixture(scope="module")
def texts(smol) -> list[str]:
    return written(smol)


def written(folder: Path) -> list[str]:
    """What transformers' packed model writes after each prompt."""
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**tokens, max_new_tokens=TOKENS, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        found.append(tokenizer.decode(out, skip_special_tokens=True))
    return found


class Server:
    """`vllm serve` of a folder, in a process group of its own."""

    def __init__(self, folder: Path, log: Path, *options: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        common = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--served-model-name", "it"]
        call = [str(VLLM), "serve", str(folder), "--host", "127.0.0.1", "--port", str(self.port), *common, *options]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                call,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | settings | environment,
                start_new_session=True,
                cwd=tempfile.gettempdir(),
            )

    def wait(self) -> "Server":
        """Returns once the server answers."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            time.sleep(0.5)
        raise AssertionError(f"the server did not start, status {self.process.poll()}: {self.log.read_text()[-3000:]}")

    @property
    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def complete(self, prompt: str) -> str:
        """The text after a prompt, greedily."""
        found = self.client.completions.create(model="it", prompt=prompt, max_tokens=TOKENS, temperature=0)
        return found.choices[0].text

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Ends all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Server":
        try:
            return self.wait()
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


def test_the_text_of_one_request_and_of_eight_at_once(smol, texts, tmp_path):
    with Server(smol, tmp_path / "log", "--enforce-eager") as server:
        assert [server.complete(prompt) for prompt in PROMPTS[:2]] == texts[:2]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(server.complete, PROMPTS)) == texts
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = server.client.chat.completions.create(model="it", messages=question, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content
        assert [model.id for model in server.client.models.list().data] == ["it"]


def test_a_compiled_model(smol, texts, tmp_path):
    with Server(smol, tmp_path / "log") as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(server.complete, PROMPTS)) == texts
        assert server.complete(PROMPTS[0]) == texts[0]


@pytest.fixture(scope="module")
def mixture_texts(mixture) -> list[str]:
    return written(mixture)


def test_a_mixture(mixture, mixture_texts, tmp_path):
    with Server(mixture, tmp_path / "log", "--enforce-eager") as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(server.complete, PROMPTS)) == mixture_texts


def test_a_compiled_mixture(mixture, mixture_texts, tmp_path):
    with Server(mixture, tmp_path / "log") as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(server.complete, PROMPTS)) == mixture_texts


def test_ranks_have_their_parts(smol, texts, tmp_path):
    """Three ranks: SmolLM2 has nine heads and three heads of keys and values."""
    options = "--enforce-eager", "--tensor-parallel-size", "3"
    with Server(smol, tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1") as server:
        assert [server.complete(prompt) for prompt in PROMPTS[:4]] == texts[:4]


def test_an_archive(smol, texts, tmp_path):
    unpack(smol, tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "archive", "archive")
    with Server(tmp_path / "archive", tmp_path / "log", "--enforce-eager") as server:
        assert [server.complete(prompt) for prompt in PROMPTS[:2]] == texts[:2]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_survivors(bits, gguf, folders, tmp_path):
    folder = folders / f"codes{bits}"
    if not folder.exists():
        packed(gguf, folder, f"fast + quantize(bits={bits})")
    expected = written(folder)
    with Server(folder, tmp_path / "log", "--enforce-eager") as server, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(server.complete, PROMPTS)) == expected


def test_a_killed_server_starts_again(smol, texts, tmp_path):
    from openai import OpenAIError

    with Server(smol, tmp_path / "first", "--enforce-eager") as server, ThreadPoolExecutor(1) as thread:
        assert server.complete(PROMPTS[0]) == texts[0]
        pending = thread.submit(
            server.client.completions.create, model="it", prompt=PROMPTS[1], max_tokens=200, temperature=0
        )
        time.sleep(0.5)  # the request is being answered, or has been
        server.stop(signal.SIGKILL)
        with contextlib.suppress(OpenAIError):
            pending.result(60)
    with Server(smol, tmp_path / "second", "--enforce-eager") as server:
        assert server.complete(PROMPTS[0]) == texts[0]


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def changed_bitmap(file: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight.bitmap"
    (packed_file,) = PackedShards(file.parent).packed
    place = packed_file._entries[name].offset
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))


def missing(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [truncated, changed_bitmap, missing])
def test_a_damaged_folder_is_one_line(damage, smol, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(smol, folder)
    (file,) = folder.glob(f"*{SUFFIX}")
    damage(file)
    server = Server(folder, tmp_path / "log", "--enforce-eager")
    try:
        assert server.process.wait(WAIT) == 2
    finally:
        server.stop(signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    (line,) = [line for line in log.splitlines() if "ace_ext: " in line]
    assert str(folder) in line
    assert line == log.splitlines()[-1]


def test_bench_of_a_smaller_model(tmp_path):
    """In torch and in vLLM, each beside the dense model."""
    dense, smaller = tmp_path / "dense", tmp_path / "smaller"
    # With a hidden size of 256, vLLM 0.32 ends with an illegal instruction on an Intel Xeon with AMX.
    script("tools/make_synthetic_llama.py").make(dense, layers=2, hidden=512, intermediate=2048)
    own = ["--remove", "neurons=0.25", "--calibration", str(dense / "text.txt"), "--nsamples", "4", "--seqlen", "32"]
    bench = ["bench", str(smaller), "--dense", str(dense), "--against", "vllm", "--tokens", "64", "--rounds", "1"]
    for command in (
        ["run", "--model", str(dense), "--output", str(smaller), *own],
        [*bench, "--prefill", "16", "--json"],
    ):
        call = [sys.executable, "-m", "ace_ext", *command]
        done = subprocess.run(call, check=True, cwd=tempfile.gettempdir(), stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)["figures"]
    names = [(one["name"], one["beside"]) for one in found]
    assert names == [("dense", ""), ("smaller", "dense"), ("vllm dense", ""), ("vllm smaller", "vllm dense")]
    for one in found:
        assert min(*one["decode"].values(), one["prefill"]) > 0
        assert one["memory_bytes"] > one["program_bytes"] > 10**7
        assert one["engine"].startswith("vLLM" if "vllm" in one["name"] else "torch")
    assert min(*found[3]["beside_decode"].values(), found[3]["beside_prefill"]) > 0
