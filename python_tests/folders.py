"""Tiny models as folders on disk, and runs over them as the command line makes them."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from tiny_models import make_model, make_tokenizer, make_tokens

from ace_ext import PruneConfig
from ace_ext.cli import main as cli
from ace_ext.data.bos import BosChoice
from ace_ext.data.windows import CalibrationData
from ace_ext.fingerprint import tokens_sha256
from ace_ext.pruning.metrics import DEFAULT_METRIC
from ace_ext.runs.model_source import Demand
from ace_ext.runs.options import Calibration, RunOptions
from ace_ext.runs.pipeline import prune_folder

TEXT = "the quick brown fox jumps over the lazy dog " * 40


@contextlib.contextmanager
def full_disk():
    """While it lasts, the disk is full after a quarter of what ``Path.write_bytes`` writes."""
    write = Path.write_bytes

    def torn(path, data):
        write(path, data[: len(data) // 4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(Path, "write_bytes", torn):
        yield


class Tokens(Calibration):
    """Calibration on given tokens. For some families transformers replaces the tiny tokenizer by another class, which
    does not know the tiny vocabulary."""

    def check(self) -> None:
        pass

    def choose_bos(self, tokenizer, model, logits=None) -> BosChoice:
        return BosChoice("never", None, "the tokens are given")

    def load(self, tokenizer, model, bos=None, progress=False, note=None) -> CalibrationData:
        tokens = make_tokens(self.nsamples, self.seqlen, self.seed)
        return CalibrationData(tokens, self.source, self.seed, tokens_sha256(tokens), bos)


def save_dense(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **save) -> Path:
    """A dense model with its tokenizer, and ``text.txt`` beside it to calibrate on."""
    make_model(family, dtype).save_pretrained(folder, **save)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def prune(dense: Path, output: Path, run: dict | None = None, calibration: dict | None = None, **config):
    """``(report, path)`` of a run; ``run`` are RunOptions, ``calibration`` changes the 8 x 16 tokens of the text.
    Wanda's scores alone prune unless ``config`` has a ``method``."""
    text = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 16, **(calibration or {})}
    dtype, progress = text.pop("dtype", "auto"), text.pop("progress", None)
    kind = Tokens if text["source"] == "tokens" else Calibration
    options, device = RunOptions(**(run or {})), torch.device("cpu")
    config = PruneConfig(**{"method": DEFAULT_METRIC, **config})
    return prune_folder(str(dense), output, config, kind(**text), options, device, dtype, progress)


def weights_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def command(dense: Path, output: Path, *options, launcher: tuple = ()) -> list[str]:
    """The command line of ``ace-prune run`` with the text in the model's folder. Wanda's scores alone prune, as in
    :func:`prune`, unless ``options`` have a ``--method``."""
    start = [sys.executable, *launcher, "-m", "ace_ext", "run", "--device", "cpu"]
    text = ["--calibration", dense.parent / "text.txt", "--nsamples", 8, "--seqlen", 16]
    alone = () if "--method" in options else ("--method", DEFAULT_METRIC)
    return [str(part) for part in (*start, "--model", dense, "--output", output, *text, *alone, *options)]


def fork_run(arguments: list, hidden_in_files: bool = False) -> multiprocessing.Process:
    """Starts ``ace-prune`` with these arguments as a process that can be killed. It is forked from a server that has
    imported everything, so it starts at once."""
    return fork(_run_child, [str(part) for part in arguments], hidden_in_files)


def fork(target: Callable[..., None], *arguments) -> multiprocessing.Process:
    """Starts a function in a process forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ace_ext.cli.main", "transformers.models.llama.modeling_llama", "accelerate"])
    child = context.Process(target=target, args=arguments)
    here = os.getcwd()
    os.chdir(tempfile.gettempdir())  # the server looks for modules where it was started: not in the source tree
    try:
        child.start()
    finally:
        os.chdir(here)
    return child


def _run_child(arguments: list[str], hidden_in_files: bool) -> None:
    torch.set_num_threads(1)
    if hidden_in_files:
        patch.object(Demand, "hidden_fits", lambda _: False).start()  # raises where there is no such name
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        sys.exit(cli.main(arguments))


def spawn(arguments: list[str], **environment) -> subprocess.Popen:
    """Starts a command and captures its output. It runs outside the source tree, so that -m finds the installed
    package."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, cwd=tempfile.gettempdir(), env=env)


def tree(place: Path) -> dict[str, str]:
    """Everything below a folder: each file's hash, where links lead, and folders."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def bad_input(capsys, verb: str, model: Path, *options, output: str | Path = "bad") -> str:
    """The error of a call of the command line in this process, which must be one line with status 2 and no result.
    ``verb``: ``run`` writes to ``output`` beside the model, and reads the text beside it unless it prunes from
    statistics; ``eval`` and ``verify`` take no pruning options."""
    text = ("--calibration", model.parent / "text.txt", "--nsamples", 4, "--seqlen", 8)
    text = () if "--stats" in options else text
    arguments = {
        "run": ("run", "--model", model, "--output", model.parent / output, *text, *options),
        "plan": ("plan", "--model", model, *text, *options),
        "eval": ("eval", "--model", model, "--text", model.parent / "text.txt", "--seqlen", 8),
        "verify": ("verify", model),
    }[verb]
    status, out, error = call(capsys, *arguments)
    assert status == 2, (status, error)
    assert error.count("\n") == 1, error
    assert error.startswith("ace-prune"), error
    assert out == ""
    return error


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Status, stdout and stderr of a call of the command line in this process."""
    capsys.readouterr()
    try:
        status = cli.main([str(part) for part in arguments])
    except SystemExit as end:  # argparse's own way out
        status = int(end.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err
