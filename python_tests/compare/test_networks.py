"""Comparisons on networks that are no causal language models."""

import json
import re

import pytest
import torch
from folders import call
from PIL import Image
from tiny_models import make_model, make_tokenizer
from tiny_networks import make_network
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTModel

from ace_ext import prune_model
from ace_ext.data.agreement import agreement, answers
from ace_ext.data.held_out_inputs import text_samples
from ace_ext.data.windows import evaluation_tokens, load_windows

WORDS = "the quick brown fox jumps over the lazy dog "
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny networks, texts and images."""
    path = tmp_path_factory.mktemp("networks")
    for name in ("bert", "t5"):
        make_network(name).save_pretrained(path / name)
        make_tokenizer().save_pretrained(path / name)
    make_model("llama").save_pretrained(path / "llama")
    make_tokenizer().save_pretrained(path / "llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(path / "vit")
    (path / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (path / "text.txt").write_text(WORDS * 40)
    (path / "other.txt").write_text(" ".join(reversed(WORDS.split())) * 40)
    (path / "pairs.jsonl").write_text('{"image": "photos/0.png"}\n')
    for folder, count in (("photos", 5), ("held", 4)):
        (path / folder).mkdir()
        for number in range(count):
            noise = torch.randint(256, (9, 12, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(path / folder / f"{number}.png")
    return path


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


TEXT = ["--calibration", "text.txt", "--texts", "other.txt", "--lengths", "4x16", "--eval-seqlen", "8"]
IMAGES = ["--calibration", "photos", "--texts", "held", "--nsamples", "3"]


def compared(capsys, *arguments):
    status, out, error = call(capsys, "compare", "--device", "cpu", "--json", *arguments)
    assert status == 0, error
    return json.loads(out)


def test_figures_are_those_of_a_single_run(capsys):
    found = compared(capsys, "--model", "bert", "--methods", "wanda", *TEXT)
    model = AutoModelForSequenceClassification.from_pretrained("bert")
    tokenizer = make_tokenizer()
    windows = evaluation_tokens("other.txt", tokenizer)[: 24 * 8].view(24, 8)
    inputs = text_samples(model, windows)
    dense = answers(model, inputs)
    prune_model(model, load_windows("text.txt", tokenizer, 4, 16, 0, bos="never").tokens, method="wanda", sparsity=0.5)
    wanted = agreement(dense, answers(model, inputs))
    (run,) = found["runs"]
    scores = {name: score["value"] for name, score in run["tasks"].items()}
    assert scores == {
        "other.txt: cosine": wanted.cosine,
        "other.txt: rank correlation": wanted.rank_correlation,
        "other.txt: same labels": wanted.labels,
    }
    assert run["perplexity"] == found["dense"] == {}
    assert {name: score["value"] for name, score in found["dense_tasks"].items()} == pytest.approx(
        dict.fromkeys(scores, 1.0)
    )


def test_an_encoder_and_its_decoder_are_compared_on_halves(capsys):
    found = compared(capsys, "--model", "t5", "--methods", "wanda; wanda + distill(tokens=100)", *TEXT)
    assert [set(run["tasks"]) for run in found["runs"]] == [
        {f"other.txt: {name}" for name in ("cosine", "rank correlation", "same labels")}
    ] * 2


def test_images_with_a_page(capsys, tmp_path):
    arguments = ["--model", "vit", "--methods", "wanda; fast", "--seeds", "0,1", *IMAGES]
    found = compared(capsys, *arguments, "--output", str(tmp_path / "new"))
    assert [run["cell"]["seqlen"] for run in found["runs"]] == [0] * 4
    again = compared(capsys, *arguments, "--output", str(tmp_path / "new"))
    assert again["runs"] == found["runs"]
    page = (tmp_path / "new" / "report.html").read_text()
    assert "Agreement with the dense model against the share of zeros" in page
    status, table, _ = call(capsys, "compare", *arguments, "--output", str(tmp_path / "new"))
    assert status == 0
    assert "rank correlation" in table
    assert "Calibrated on photos: 3 samples at most." in table
    assert "4 of held" in table
    for png in ("sparsity", "calibration", "seconds", "blocks"):
        assert (tmp_path / "new" / f"{png}.png").stat().st_size > 1000


REFUSED = {
    "tasks": (["--model", "bert", *TEXT, "--tasks", "local"], "tasks (are for models that predict|need lm-eval)"),
    "text for images": (["--model", "vit", *TEXT], "text.txt is text, and 'vit' reads pixel_values|other.txt is text"),
    "images for text": (["--model", "llama", *IMAGES], "'llama' reads text, and photos has images or sound"),
    "own text": (
        ["--model", "bert", "--texts", "text.txt", "--calibration", "self", "--lengths", "4x8"],
        "self needs a model that writes",
    ),
    "no sample": (
        ["--model", "vit", "--calibration", "photos", "--texts", "held", "--nsamples", "0"],
        "nsamples: 0 found",
    ),
    "both": (["--model", "vit", "--calibration", "photos"], "must all be images or sound, or all texts"),
    "seqlen": (["--model", "vit", *IMAGES, "--seqlen", "8"], "give lengths|seqlen is for texts, and photos has images"),
    "eval-seqlen": (["--model", "vit", *IMAGES, "--eval-seqlen", "8"], "eval-seqlen is for texts, and photos has"),
    "text-field": (
        ["--model", "vit", "--calibration", "pairs.jsonl", "--texts", "pairs.jsonl", "--text-field", "text"],
        "text-field is for texts, and pairs.jsonl has images",
    ),
    "too little": (
        ["--model", "bert", *TEXT, "--eval-windows", "2"],
        "gives 2 windows of 8 tokens, and agreement needs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, capsys, tmp_path):
    arguments, message = REFUSED[case]
    status, _, error = call(
        capsys, "compare", "--device", "cpu", "--methods", "wanda", *arguments, "--output", str(tmp_path / "new")
    )
    assert status == 2
    assert error.count("\n") == 1
    assert re.search(message, error)
