#!/usr/bin/env python3
"""What pruning leaves of networks that are not causal language models, by several methods, with the dense model beside.

    python tools/fetch_models.py models minilm whisper-base
    python benchmarks/networks.py encoder models/all-MiniLM-L6-v2
    python benchmarks/networks.py speech models/whisper-base     # needs espeak-ng, soundfile and scipy
    python benchmarks/networks.py vision                         # needs scikit-learn; trains a small ViT first

encoder: a sentence encoder is calibrated on sentences and compared with the dense one on held-out ones, by the mean
cosine of the embeddings and the rank correlation of the similarities of all pairs.
speech: Whisper is calibrated on spoken sentences with their text. Its word error rate is measured on other sentences,
and so is the change of its transcripts: the word error rate with the dense transcripts as references.
vision: a ViT of 4 blocks is trained on scikit-learn's digits and calibrated on some of them. Its accuracy on others is
measured, and the share of labels that are the dense model's.

Sentences are from ``--text``, a source of ``ace-prune`` with a calibration part and a held-out part. Each row is one
method and one amount; methods are separated by ``;``. Methods that distil train on other text of the calibration part.
"""

import argparse
import copy
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from ace_ext import prune_model
from ace_ext.compare.grid import Grid, Study
from ace_ext.data.agreement import agreement, answers, word_error_rate, words
from ace_ext.data.corpora import CALIBRATION, HELD_OUT, load_text
from ace_ext.pruning.method import parse_list

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, existing_folder, one_line_errors

METHODS = "wanda; ace; fast; published-sparsegpt; balanced; best"
AMOUNTS = "0.5; 2:4"
BATCH = 16
VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m3")
CLIP_WORDS = 50
"""Words of a spoken clip: some 22 s, of the 30 s that Whisper hears."""

IGNORED = {"encoder": ("clips", "epochs"), "speech": ("epochs",), "vision": ("model", "text", "clips")}
"""Arguments that a kind does not use."""

Batches = list[dict[str, Tensor]]


@dataclass
class Subject:
    """A model, what it is calibrated on, and how it is measured."""

    model: nn.Module
    calibration: Batches
    measure: Callable[[nn.Module], dict[str, float]]
    """The figures of a model, by their names in the table."""
    distillation: Batches | None = None
    """What methods that distil train on, as a run takes other text of the same source; None: the calibration."""


def sentences(source: str, split: str, count: int, seed: int, most_words: int = 40, more: int = 0) -> list[str]:
    """``count`` sentences of at least 6 words, without digits, in random order; then up to ``more`` others."""
    found = re.split(r"(?<=[.!?])\s+", " ".join(load_text(source, split)))
    plain = [s for s in found if re.fullmatch(r"[A-Z][A-Za-z ,;'’-]+[.!?]", s) and 6 <= len(s.split()) <= most_words]
    random.Random(seed).shuffle(plain)
    if len(plain) < count:
        raise SystemExit(f"{source} has {len(plain)} sentences to use in its part {split}; {count} are needed")
    return plain[: count + more]


def encoder(args: argparse.Namespace) -> Subject:
    """A sentence encoder: 256 sentences to calibrate on, up to 2,000 to distil on, 200 held-out ones to compare."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32)

    def batches(texts: list[str]) -> Batches:
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        return [dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts]

    text = args.text or "wiki-mini"
    seen = sentences(text, CALIBRATION, 256, args.seed, more=2000)
    held_out = batches(sentences(text, HELD_OUT, 200, args.seed))
    dense = answers(model, held_out)

    def measure(pruned: nn.Module) -> dict[str, float]:
        found = agreement(dense, answers(pruned, held_out))
        return {"cosine": found.cosine, "rank correlation": found.rank_correlation}

    return Subject(model, batches(seen[:256]), measure, batches(seen[256:]))


def clips(source: str, split: str, count: int, seed: int) -> list[str]:
    """Texts of whole sentences, of at most ``CLIP_WORDS`` words."""
    found: list[str] = [""]
    for sentence in sentences(source, split, count * CLIP_WORDS // 12, seed, most_words=25):
        if len(words(found[-1] + sentence)) > CLIP_WORDS:
            found.append("")
        found[-1] = f"{found[-1]} {sentence}".strip()
    if len(found) <= count:
        raise SystemExit(f"{source} has too few sentences for {count} clips in its part {split}")
    return found[:count]


def spoken(texts: Sequence[str], rate: int) -> list[Tensor]:
    """Each text as espeak-ng speaks it: float32 ``[samples]`` at ``rate`` Hz; voices take turns."""
    import soundfile
    from scipy.signal import resample_poly

    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.wav")
        for number, text in enumerate(texts):
            voice = VOICES[number % len(VOICES)]
            subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", file, "--", text], check=True)
            sound, own_rate = soundfile.read(file, dtype="float32")
            found.append(torch.from_numpy(resample_poly(sound, rate, own_rate)).float())
    return found


def speech(args: argparse.Namespace) -> Subject:
    """Whisper: 24 clips to calibrate on, 24 others to transcribe."""
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(args.model, dtype=torch.float32)
    tokenizer, rate = processor.tokenizer, processor.feature_extractor.sampling_rate
    tokenizer.set_prefix_tokens(language="english", task="transcribe")
    texts = {split: clips(args.text or "news-mini", split, args.clips, args.seed) for split in (CALIBRATION, HELD_OUT)}

    def features(split: str) -> list[Tensor]:
        sounds = [sound.numpy() for sound in spoken(texts[split], rate)]
        return [processor(sound, sampling_rate=rate, return_tensors="pt").input_features for sound in sounds]

    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :-1] for text in texts[CALIBRATION]]
    calibration = [
        {"input_features": heard, "decoder_input_ids": spelled}
        for heard, spelled in zip(features(CALIBRATION), ids, strict=True)
    ]
    held_out = features(HELD_OUT)

    @torch.no_grad()
    def transcripts(model: nn.Module) -> list[str]:
        found = []
        for batch in torch.cat(held_out).split(8):
            tokens = model.eval().generate(batch, language="en", task="transcribe", max_new_tokens=3 * CLIP_WORDS)
            found += processor.batch_decode(tokens, skip_special_tokens=True)
        return found

    dense = transcripts(model)

    def measure(pruned: nn.Module) -> dict[str, float]:
        heard = dense if pruned is model else transcripts(pruned)
        return {
            "word error rate": word_error_rate(texts[HELD_OUT], heard),
            "changed words": word_error_rate(dense, heard),
        }

    return Subject(model, calibration, measure)


def vision(args: argparse.Namespace) -> Subject:
    """A ViT that is trained on 1200 digits; 256 of them to calibrate on, 597 others to label."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(args.seed))
    images = torch.from_numpy(digits.images).float()[order, None] / 8 - 1
    labels = torch.from_numpy(digits.target)[order]
    torch.manual_seed(args.seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=96, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    train(model, images[:1200], labels[:1200], args.epochs)
    calibration = [{"pixel_values": part} for part in images[:256].split(64)]
    held_out = [{"pixel_values": images[1200:]}]
    dense = answers(model, held_out)

    def measure(pruned: nn.Module) -> dict[str, float]:
        found = answers(pruned, held_out)
        right = (found.labels == labels[1200:]).float().mean()
        return {"accuracy": float(right), "same labels": agreement(dense, found).labels}

    return Subject(model, calibration, measure)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Trains a classifier of images with Adam; each image is shifted by up to one pixel, at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        shifts = [int(shift) for shift in torch.randint(-1, 2, (2,))]
        shifted = images[chosen].roll(shifts, (2, 3))
        model(pixel_values=shifted, labels=labels[chosen]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def print_table(subject: Subject, study: Study) -> None:
    """A row for the dense model, and for each method and amount; in brackets figures relative to the dense ones."""
    dense = subject.measure(subject.model)
    print(f"| method | amount | {' | '.join(dense)} | seconds |\n|---|---|{'--:|' * (len(dense) + 1)}")
    print(f"| (dense) | | {' | '.join(f'{value:.3f}' for value in dense.values())} | |", flush=True)
    for amount, method in study.grid.targets():
        model, config = copy.deepcopy(subject.model), study.config(method, amount)
        distill_text = None if config.method.distill is None else subject.distillation
        start = time.perf_counter()
        prune_model(model, subject.calibration, config, distill_text=distill_text)
        seconds = time.perf_counter() - start
        cells = [f"{value:.3f}{relative(value, dense[name])}" for name, value in subject.measure(model).items()]
        print(f"| `{method.label}` | {amount} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def relative(value: float, dense: float) -> str:
    """``value`` as a multiple of the dense model's figure, where that is neither 0 nor 1."""
    return "" if dense in (0, 1) or abs(dense - 1) < 1e-6 else f" ({value / dense:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("encoder", "speech", "vision"))
    parser.add_argument("model", nargs="?", type=existing_folder, help="the model's folder; vision needs none")
    parser.add_argument("--methods", default=METHODS, help="default: %(default)s")
    parser.add_argument("--amounts", default=AMOUNTS, help="sparsities and patterns (default: %(default)s)")
    parser.add_argument("--text", help="where sentences are from (default: wiki-mini, and news-mini for speech)")
    parser.add_argument("--clips", type=count, default=24, help="speech: clips of each part (default: %(default)s)")
    parser.add_argument("--epochs", type=count, default=60, help="vision: passes over its digits (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="chooses sentences and digits (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.model is None and args.kind != "vision":
        parser.error(f"{args.kind} needs a model's folder; tools/fetch_models.py makes one")
    for name in IGNORED[args.kind]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{args.kind} does not use {'the folder' if name == 'model' else f'--{name}'}; leave it out")
    amounts = tuple(amount.strip() for amount in args.amounts.split(";") if amount.strip())
    with one_line_errors(parser):
        study = Study(str(args.model), Grid(parse_list(args.methods), amounts))  # checks every row
        subject = {"encoder": encoder, "speech": speech, "vision": vision}[args.kind](args)
        print(f"{args.kind}, seed {args.seed}, {torch.get_num_threads()} threads, {' '.join(argv or sys.argv[1:])}\n")
        print_table(subject, study)


if __name__ == "__main__":
    main()
