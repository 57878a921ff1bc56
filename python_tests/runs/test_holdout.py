"""A run measures perplexity before and after on text that it was not calibrated on."""

import json
import math
import random

import pytest
import torch
from folders import TEXT, bad_input, call, fork_run, prune, save_dense
from tiny_models import make_english_model, make_english_tokenizer, make_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ace_ext import PruneReport
from ace_ext.data.windows import token_windows, tokens_between_samples
from ace_ext.engine.distillation import TEXT_SEED
from ace_ext.models.products import float32_products
from ace_ext.runs import holdout


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def arguments(dense, output, *options) -> list[str]:
    text = ["--calibration", dense.parent / "text.txt", "--nsamples", 4, "--seqlen", 16, "--bos", "never"]
    alone = [] if "--method" in options else ["--method", "wanda"]
    return [str(part) for part in ["run", "--model", dense, "--output", output, *alone, *text, *options]]


def figures(folder) -> dict:
    return json.loads((folder / "ace_report.json").read_text())["perplexity"]


def by_hand(folder, windows: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with float32_products(model):
        logits = model(windows).logits[:, :-1].float()
    return math.exp(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item())


def runs_of(windows: torch.Tensor, length: int = 16) -> set[tuple[int, ...]]:
    """So many tokens in a row, wherever they stand in a window."""
    return {tuple(run.tolist()) for run in windows.unfold(1, length, 1).reshape(-1, length)}


def test_what_no_sample_reads():
    documents, tokenizer = [TEXT], make_tokenizer()
    for seed in range(5):
        free = tokens_between_samples(documents, tokenizer, 16, [(4, seed)])
        marked = " ".join(str(number) for number in range(360))  # each token another word, so that places can be told

        class Places:
            bos_token_id = None

            def __call__(self, text, **_):
                return {"input_ids": [int(word) for word in text.split()]}

        read = set(token_windows([marked], Places(), 4, 16, seed).flatten().tolist())
        places = tokens_between_samples([marked], Places(), 16, [(4, seed)]).tolist()
        assert len(free) == len(places) > 60
        assert places == list(range(places[0], places[-1] + 1))
        assert not read & set(places)
        around = {places[0] - 1, places[-1] + 1} & set(range(360))
        assert around <= read  # it is as long as it can be
    assert len(tokens_between_samples(documents, tokenizer, 16, [(200, 0)])) < 8


def test_figures_are_those_of_both_folders(dense, tmp_path, capsys):
    status, printed, error = call(capsys, *arguments(dense, tmp_path / "out"))
    assert status == 0, error
    found = figures(tmp_path / "out")
    free = tokens_between_samples([TEXT], make_tokenizer(), 16, [(4, 0)])
    width = len(free) // 4 if len(free) < 256 else 128
    windows = free[: len(free) // width * width].view(-1, width)[:4]
    assert found["text"] == "text.txt, between the samples"
    assert (found["windows"], found["seqlen"], found["healed"]) == (*windows.shape, None)
    assert found["dense"] == pytest.approx(by_hand(dense, windows), rel=1e-5)
    assert found["pruned"] == pytest.approx(by_hand(tmp_path / "out", windows), rel=1e-5)
    assert found["dense"] != found["pruned"]
    assert f"perplexity {found['dense']:.2f} dense, {found['pruned']:.2f} pruned" in printed


def test_the_same_from_the_disk_and_resumed(dense, tmp_path, capsys):
    call(capsys, *arguments(dense, tmp_path / "out"))
    assert call(capsys, *arguments(dense, tmp_path / "disk", "--offload", "disk"))[0] == 0
    killed = fork_run(arguments(dense, tmp_path / "resumed", "--resume"))
    state = tmp_path / ".resumed.unfinished" / "state.json"
    while killed.is_alive() and not (state.is_file() and b'"finished": 1' in state.read_bytes()):
        pass
    killed.kill()
    killed.join()
    assert call(capsys, *arguments(dense, tmp_path / "resumed", "--resume"))[0] == 0
    assert figures(tmp_path / "out") == figures(tmp_path / "disk") == figures(tmp_path / "resumed")


def test_after_distillation(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    options = ("--nsamples", 16, "--method", "distill(tokens=1024, learning_rate=0.0015)")
    status, printed, error = call(capsys, *arguments(dense, tmp_path / "out", *options))
    assert status == 0, error
    found = figures(tmp_path / "out")
    assert found["healed"] not in (None, found["pruned"])
    assert f"{found['healed']:.2f} distilled" in printed


def test_a_distillation_does_not_read_what_is_measured_on(tmp_path, capsys):
    dense, words = save_dense(tmp_path / "dense"), sorted({word for word in TEXT.split() if word.isalpha()})
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=4000)))
    options = ("--nsamples", 16, "--method", "distill(tokens=1024)")
    status, _, error = call(capsys, *arguments(dense, tmp_path / "out", *options))
    assert status == 0, error
    found, text = figures(tmp_path / "out"), (tmp_path / "text.txt").read_text()
    assert found["text"] == "text.txt, between the samples"
    drawn = [token_windows([text], make_tokenizer(), count, 16, seed) for count, seed in ((16, 0), (72, TEXT_SEED))]
    free = tokens_between_samples([text], make_tokenizer(), 16, [(16, 0), (72, TEXT_SEED)])
    assert len(free) < len(tokens_between_samples([text], make_tokenizer(), 16, [(16, 0)]))
    assert not runs_of(torch.cat(drawn)) & runs_of(free[None])
    windows = free[: found["windows"] * found["seqlen"]].view(found["windows"], -1)
    assert found["dense"] == pytest.approx(by_hand(dense, windows), rel=1e-5)
    assert found["healed"] == pytest.approx(by_hand(tmp_path / "out", windows), rel=1e-5)


def test_of_a_file_that_calibrates_too_only_what_no_sample_reads(dense, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    (tmp_path / "link.txt").symlink_to("text.txt")
    assert call(capsys, *arguments(dense, tmp_path / "auto"))[0] == 0
    assert call(capsys, *arguments(dense, tmp_path / "named", "--evaluate", tmp_path / "link.txt"))[0] == 0
    assert figures(tmp_path / "named") == figures(tmp_path / "auto")
    (tmp_path / "text.txt").write_text(" ".join(TEXT.split()[:40]))  # each token is in a sample
    message = bad_input(capsys, "run", dense, "--seqlen", 40, "--evaluate", tmp_path / "text.txt")
    assert "evaluate must be text that calibration does not read" in message
    assert "give another text, or fewer samples" in message


def test_not_measured(dense, tmp_path, capsys):
    assert call(capsys, *arguments(dense, tmp_path / "never", "--evaluate", "never"))[0] == 0
    assert figures(tmp_path / "never") is None
    error = call(capsys, *arguments(dense, tmp_path / "self", "--calibration", "self"))[2]
    assert "perplexity before and after is not measured: its tokenizer knows too few English words" in error
    assert figures(tmp_path / "self") is None
    report, _ = prune(dense, tmp_path / "library")
    assert report.perplexity is None
    assert "'no.txt' is neither a file" in bad_input(capsys, "run", dense, "--evaluate", "no.txt", output="bad")
    (tmp_path / "short.txt").write_text("fox")
    message = bad_input(capsys, "run", dense, "--evaluate", tmp_path / "short.txt")
    assert "too little text" in message


def test_text_that_the_model_writes(tmp_path, capsys):
    make_english_model(False).save_pretrained(tmp_path / "dense")
    make_english_tokenizer().save_pretrained(tmp_path / "dense")
    command = ("run", "--model", tmp_path / "dense", "--output", tmp_path / "out", "--nsamples", 4, "--seqlen", 16)
    command += ("--calibration", "self")
    status, _, error = call(capsys, *command)
    assert status == 0, error
    found = figures(tmp_path / "out")
    assert found["text"] == "a short English text"
    assert (found["windows"], found["seqlen"]) == (2, holdout.WINDOW_TOKENS)
    assert PruneReport.from_json((tmp_path / "out" / "ace_report.json").read_text()).perplexity.dense == found["dense"]
