"""Tiny models as folders on disk, and runs over them as the command line makes them."""

from pathlib import Path

import torch
from tiny_models import make_model, make_tokenizer

from ace_ext import PruneConfig
from ace_ext.pipeline import Calibration, RunOptions, prune_folder

TEXT = "the quick brown fox jumps over the lazy dog " * 40


def save_dense(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **save) -> Path:
    """A dense model with its tokenizer, and ``text.txt`` beside it to calibrate on."""
    make_model(family, dtype).save_pretrained(folder, **save)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def prune(dense: Path, output: Path, run: dict | None = None, calibration: dict | None = None, **config):
    """``(report, path)`` of a run; ``run`` are RunOptions, ``calibration`` changes the 8 x 16 tokens of the text."""
    text = {"source": str(dense.parent / "text.txt"), "nsamples": 8, "seqlen": 16, **(calibration or {})}
    return prune_folder(
        str(dense), output, PruneConfig(**config), Calibration(**text), RunOptions(**(run or {})), torch.device("cpu")
    )


def weights_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
