"""Texts mixed by weights: how the name is read, how many samples each text gives, and runs on a mixture."""

import json

import pytest
import torch
from folders import TEXT, call, save_dense, weights_bytes
from tiny_models import make_tokenizer

from ace_ext.data.corpora import texts_of
from ace_ext.data.mixture import Part, is_jsonl, samples_of, without_folders
from ace_ext.data.windows import load_windows, token_windows
from ace_ext.errors import InputError


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("my.txt", [("my.txt", 1)]),
        ("a+b.txt", [("a+b.txt", 1)]),
        ("bundled + my.txt", [("bundled", 1), ("my.txt", 1)]),
        ("2 * bundled + my.txt", [("bundled", 2), ("my.txt", 1)]),
        ("bundled  +  0.5*dir/my text.txt + c4", [("bundled", 1), ("dir/my text.txt", 0.5), ("c4", 1)]),
    ],
)
def test_name_is_read(source, parts):
    assert texts_of(source) == tuple(Part(name, weight) for name, weight in parts)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bundled + ", "has no text or no weight at ''"),
        ("* bundled + a.txt", "has no text or no weight at '* bundled'"),
        ("a.txt + a.txt", "names a text twice; give it once, with a weight such as 2 * a.txt"),
        ("2 * a.txt + a.txt", "names a text twice"),
        ("bundled + self", "'self' cannot be mixed with other texts"),
        ("0 * bundled + a.txt", "has the weight '0'; use a number above 0"),
        ("1.2.3 * bundled + a.txt", "has the weight '1.2.3'"),
        (f"{'9' * 400} * bundled + a.txt", "; use a number above 0"),
    ],
)
def test_bad_name_is_refused(source, message):
    with pytest.raises(InputError) as refused:
        texts_of(source)
    assert message in str(refused.value)


def test_a_file_by_two_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("fox")
    (tmp_path / "link.txt").symlink_to("a.txt")
    for other in ("./a.txt", "link.txt", tmp_path / "a.txt"):
        with pytest.raises(InputError, match="names a text twice; give it once"):
            texts_of(f"bundled + 2 * a.txt + {other}")


@pytest.mark.parametrize(
    ("weights", "nsamples", "counts"),
    [
        ((1, 1), 8, [4, 4]),
        ((1, 1), 7, [4, 3]),
        ((2, 1), 64, [43, 21]),
        ((1, 1, 1), 128, [43, 43, 42]),
        ((0.1, 0.3), 4, [1, 3]),
    ],
)
def test_samples_are_shared_by_weight(weights, nsamples, counts):
    parts = tuple(Part(f"{number}.txt", weight) for number, weight in enumerate(weights))
    assert samples_of(parts, nsamples) == counts


def test_a_text_without_samples_is_refused():
    with pytest.raises(InputError, match=r"nsamples: 4 found, of which b\.txt gets none"):
        samples_of((Part("a.txt", 100), Part("b.txt")), 4)


def test_names_without_folders():
    assert without_folders("/some/where/a.txt") == "a.txt"
    assert without_folders("2*/some/where/a.txt + bundled + ../b.jsonl") == "2 * a.txt + bundled + b.jsonl"
    assert without_folders("/x/a/train.txt + 3 * /x/b/train.txt") == "a/train.txt + 3 * b/train.txt"
    assert without_folders("/a/x.txt + x.txt + c4") == "a/x.txt + x.txt + c4"
    assert is_jsonl(["a.jsonl + b.txt"])
    assert not is_jsonl(["a.txt + b.txt", None])


@pytest.fixture
def files(tmp_path):
    (tmp_path / "fox.txt").write_text("fox " * 300)
    (tmp_path / "dog.txt").write_text("dog " * 300)
    return f"3 * {tmp_path / 'fox.txt'} + {tmp_path / 'dog.txt'}"


def test_each_text_gives_its_samples(files):
    tokenizer = make_tokenizer()
    fox, dog = (tokenizer(word)["input_ids"][-1] for word in ("fox", "dog"))
    data = load_windows(files, tokenizer, 16, 8, 0, bos="never")
    first = data.tokens[:, -1]
    assert (data.tokens == first[:, None]).all()  # no window has two texts
    assert (first == fox).sum() == 12
    assert (first == dog).sum() == 4
    assert first[:12].tolist() != [fox] * 12  # the texts alternate
    assert data.source == files
    assert torch.equal(data.tokens, load_windows(files, tokenizer, 16, 8, 0, bos="never").tokens)
    assert data.sha256 != load_windows(files, tokenizer, 16, 8, 1, bos="never").sha256


def test_samples_of_one_text_are_as_without_a_mixture(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = load_windows(str(tmp_path / "text.txt"), make_tokenizer(), 6, 8, 3, bos="never")
    assert torch.equal(data.tokens, token_windows([TEXT], make_tokenizer(), 6, 8, 3))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


MIXTURE = "bundled + 3 * text.txt"


def arguments(verb: str, *options: object, calibration: str = MIXTURE) -> tuple[object, ...]:
    text = ("--calibration", calibration, "--nsamples", 8, "--seqlen", 16, "--bos", "never")
    return (verb, "--model", "dense", *text, *options)


def test_run_on_a_mixture(place, capsys):
    status, _, error = call(capsys, *arguments("run", "--output", "out", "--save-stats", "stats.zip"))
    assert status == 0, error
    report = json.loads((place / "out" / "ace_report.json").read_text())
    assert report["extra"]["calibration"]["source"] == MIXTURE
    assert f"--calibration '{MIXTURE}'" in report["extra"]["command"]
    assert report["perplexity"]["text"] == "bundled, held-out part; text.txt, between the samples"
    assert MIXTURE in (place / "out" / "README.md").read_text()
    resumed = arguments("run", "--output", "out", "--save-stats", "stats.zip", "--resume")
    assert "already complete" in call(capsys, *resumed)[2]
    assert call(capsys, "run", "--model", "dense", "--output", "stored", "--stats", "stats.zip")[0] == 0
    assert weights_bytes(place / "out") == weights_bytes(place / "stored")
    options = ("--output", "out", "--save-stats", "stats.zip", "--resume")
    status, _, error = call(capsys, *arguments("run", *options, calibration="bundled + text.txt"))
    assert status == 2
    assert f'source was "{MIXTURE}", now "bundled + text.txt"' in error


def test_plan_on_a_mixture(place, capsys):
    status, printed, error = call(capsys, *arguments("plan", "--json"))
    assert status == 0, error
    assert json.loads(printed)["seconds"]["text"] > 0


def test_compare_on_a_mixture(place, capsys):
    grid = ("--methods", "wanda", "--lengths", "8x16", "--texts", "bundled", "--eval-seqlen", 32, "--eval-windows", 2)
    command = (
        "compare",
        "--model",
        "dense",
        *grid,
        "--output",
        "table",
        "--calibration",
        "bundled + text.txt,text.txt",
    )
    status, printed, error = call(capsys, *command)
    assert status == 0, error
    assert "bundled + text.txt" in printed
    assert call(capsys, *command)[1] == printed  # all runs are recorded
    (place / "text.txt").write_text(f"{TEXT} and more")
    status, _, error = call(capsys, *command)
    assert status == 2
    assert "bundled + text.txt" in error
