"""The model card of an output folder: its metadata, its figures, its licence, equal bytes, and the command it names."""

import shlex
import shutil

import pytest
import torch
from folders import call, full_disk, prune, save_dense, tree
from huggingface_hub import ModelCard
from tiny_models import make_model, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.cards import BASE_CARD, CARD, card_says, write_card
from ace_ext.cards.card import removal_words
from ace_ext.cli import args as shared
from ace_ext.cli import heal as heal_verb
from ace_ext.cli.main import build_parser
from ace_ext.models.location import hub_name
from ace_ext.packed.packing import pack, unpack
from ace_ext.pruning.stages import Score
from ace_ext.records import REPORT_NAME
from ace_ext.runs import unfinished
from ace_ext.runs.command import heal_command, run_command
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_request import HealOptions, HealRequest
from ace_ext.runs.heal_text import recorded_text
from ace_ext.runs.output import read_report
from ace_ext.runs.own_files import MANIFEST_NAME, foreign_files
from ace_ext.runs.verify import verify

BASE = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, de]
datasets: [some/data]
tags: [tiny]
base_model: org/older
---
# The dense model
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``dense`` with a card, ``out`` pruned from it, and ``healed``."""
    place = tmp_path_factory.mktemp("cards")
    dense = save_dense(place / "dense")
    (dense / CARD).write_text(BASE)
    prune(dense, place / "out", calibration={"evaluate": "auto"}, method="admm", sparsity=0.75)
    text = recorded_text(read_report(place / "out"))
    heal_folder(HealRequest(str(place / "out"), place / "healed", text, options=HealOptions(tokens=64)))
    return place


def test_the_hub_reads_the_metadata(place):
    data = ModelCard.load(place / "out" / CARD).data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "ace_ext"],
    }
    assert (place / "out" / BASE_CARD).read_text() == BASE
    assert (place / "dense" / CARD).read_text() == BASE


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (
            {"method": "admm + quantize(bits=4)"},
            (
                "# `dense`, pruned: 50 % zeros, quantized: 4 bits",
                ", pruned with `ace_ext`",
                "| `quantize` | rounds kept weights to a grid",
                "| grid | 4 bits, a scale for each row and 128 columns: ",
            ),
        ),
        (
            {"method": "quantize(bits=8)"},
            (
                "# `dense`, quantized: 8 bits",
                ", quantized with `ace_ext`",
                "no weight was removed, and the weights of its matrices are on a grid",
                "| kept | all |",
                "| mask | none, because no weight was removed",
            ),
        ),
        ({"method": "quantize(bits=3, group=64) + distill(tokens=64)"}, ("# `dense`, quantized: 3 bits",)),
    ],
    ids=str,
)
def test_what_the_card_says_of_a_grid(config, lines, tmp_path):
    report, out = prune(save_dense(tmp_path / "dense"), tmp_path / "out", **config)
    text = (out / CARD).read_text()
    for line in lines:
        assert line in text
    assert card_says(out)[0] == len(report.matrices)
    if "admm" in config["method"]:
        assert "sparsity" in text
        return
    assert "--sparsity" not in text  # the command that repeats it


def test_what_the_card_says(place):
    text, report = (place / "out" / CARD).read_text(), read_report(place / "out")
    measured = report.perplexity
    for line in (
        "# `dense`, pruned: 75 % zeros",
        "| share of zeros in the pruned matrices | 0.7500 |",
        f"| pruned matrices | {len(report.matrices)} of 3 blocks, 23,040 weights in bfloat16 |",
        f"| method | `{report.method}` |",
        "| mask | chosen by ADMM's remaining error; the paper's scores were not used |",
        "| `admm` | weights and mask together by ADMM",
        "| calibration | `text.txt`: 8 samples of 16 tokens, seed 0 |",
        f"| {measured.dense:.2f} | {measured.pruned:.2f} |\n",
        "zeros are stored and multiplied like other numbers",
        "`tiny-licence`, as the card of the dense model says",
    ):
        assert line in text
    assert str(place) not in text
    assert card_says(place / "out") == (len(report.matrices), 0.75)


def test_a_healed_folder_has_a_card_of_its_own(place):
    text, report = (place / "healed" / CARD).read_text(), read_report(place / "healed")
    assert f"| distillation | from the dense model on {report.healing.tokens} tokens, masks fixed |" in text
    assert "Not measured: `ace-prune eval` does." in text
    assert "    ace-prune heal PRUNED --output OUTPUT --tokens 64\n" in text
    assert ModelCard(text).data.license_name == "tiny-licence"
    assert (place / "healed" / BASE_CARD).read_text() == BASE
    assert not foreign_files(place / "healed")
    assert verify(place / "healed").problems == []


@pytest.mark.parametrize("base", [True, False], ids=["with-base", "without"])
def test_a_card_that_could_not_be_written_is_no_base_card(base, place, tmp_path):
    """The disk is full in the middle of it; the next call writes the same card, and no other."""
    folder = shutil.copytree(place / "out", tmp_path / "out")
    report = read_report(folder)
    for name in (CARD, BASE_CARD):
        (folder / name).unlink(missing_ok=True)
    if base:
        (folder / CARD).write_text(BASE)
    whole = shutil.copytree(folder, tmp_path / "whole")
    write_card(whole, report)
    with full_disk(), pytest.raises(OSError, match="No space"):
        write_card(folder, report)
    write_card(folder, report)
    assert tree(folder) == tree(whole)


def test_a_run_that_ends_with_a_distillation_has_one_command(place, tmp_path):
    dense = shutil.copytree(place / "dense", tmp_path / "dense")
    shutil.copy(place / "text.txt", tmp_path)
    _, out = prune(dense, tmp_path / "out", calibration={"evaluate": "auto"}, method="admm + distill(tokens=1024)")
    text = (out / CARD).read_text()
    assert text.count("    ace-prune") == 1
    assert "--method 'admm + distill(tokens=1024)'" in text
    assert "| dense | pruned | distilled |\n|---|---|---|\n" in text


# Equal runs, equal bytes


def test_equal_runs_in_other_places_write_equal_cards(place, tmp_path):
    for number, offload in ((1, "none"), (2, "disk")):
        dense = shutil.copytree(place / "dense", tmp_path / str(number) / "dense")
        shutil.copy(place / "text.txt", dense.parent)
        _, out = prune(
            dense, dense.parent / "x", {"offload": offload}, {"evaluate": "auto"}, method="admm", sparsity=0.75
        )
        assert (out / CARD).read_bytes() == (place / "out" / CARD).read_bytes()


@pytest.mark.parametrize("where", ["write_card", "write_manifest", "os.replace"])
def test_a_run_that_ends_while_it_finishes_is_resumed(where, place, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    options = {"calibration": {"evaluate": "auto"}, "method": "admm", "sparsity": 0.75}
    with monkeypatch.context() as patched:
        patched.setattr(f"{unfinished.__name__}.{where}", fail)
        with pytest.raises(InputError, match="--resume"):
            prune(place / "dense", tmp_path / "out", **options)
    _, out = prune(place / "dense", tmp_path / "out", {"resume": True}, **options)
    differ = (REPORT_NAME, MANIFEST_NAME)  # seconds
    found, expected = tree(out), tree(place / "out")
    assert {n: v for n, v in found.items() if n not in differ} == {n: v for n, v in expected.items() if n not in differ}


@pytest.mark.parametrize("where", ["write_card", "write_manifest"])
def test_a_pruned_model_that_is_pruned_again_is_resumed(where, place, tmp_path, monkeypatch):
    """It brings a report, a manifest and a card of its own, which are replaced at the end."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"{unfinished.__name__}.{where}", fail)
        with pytest.raises(InputError, match="--resume"):
            prune(place / "out", tmp_path / "out", sparsity=0.9)
    _, out = prune(place / "out", tmp_path / "out", {"resume": True}, sparsity=0.9)
    assert verify(out).problems == []
    assert (out / BASE_CARD).read_text() == BASE
    assert ModelCard.load(out / CARD).data.license_name == "tiny-licence"


# The card of the dense model


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("", None),
        ("# no metadata\n", None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", ["mit", "apache-2.0"]),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: 3\nlanguage: no\n---\n", None),
        ("---\nlicense: 'm\\nit'\n---\n", "m\\nit"),
        ('---\nlicense: "m\\nit"\n---\n', None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: &a [*a]\n---\n", None),
        ("---\n" + "[" * 5000 + "\n---\n", None),
        ("---\n\0\n---\n", None),
        (f"---\nlicense: {'x' * 301}\n---\n", None),
        ("---\nlicense: mit\n---\n" + "x" * 2**20, None),  # longer than is read
        (b"\xff\xfe---\nlicense: mit\n---\n", None),
    ],
)
def test_whatever_card_the_dense_model_has(card, licence, pruned, tmp_path):
    (tmp_path / CARD).write_bytes(card if isinstance(card, bytes) else card.encode())
    write_card(tmp_path, pruned)
    assert ModelCard.load(tmp_path / CARD).data.license == licence
    assert ("names its licence: check it" in (tmp_path / CARD).read_text()) == (licence is None)
    assert (tmp_path / BASE_CARD).is_file()
    before = tree(tmp_path)
    write_card(tmp_path, pruned)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def pruned():
    """The report of a model in memory: without a name, a text or a command."""
    model = make_model("llama")
    return prune_model(model, make_tokens(), PruneConfig("wanda", pattern="2:4"))


def test_a_card_from_python(pruned, tmp_path):
    write_card(tmp_path, pruned)
    text = (tmp_path / CARD).read_text()
    assert "# `a model`, pruned: 2:4\n" in text
    assert "| kept | 2 of each 4 consecutive weights of a row |" in text
    assert "How it was made" not in text
    assert not (tmp_path / BASE_CARD).exists()
    assert card_says(tmp_path) == (len(pruned.matrices), 0.5)


def test_a_model_that_is_pruned_again_keeps_its_origin(pruned, tmp_path):
    pruned.extra = {"model": "org/tiny", "base_model": "org/tiny"}
    write_card(tmp_path, pruned)
    pruned.extra = {"model": str(tmp_path), "base_model": None}
    for _ in range(2):
        write_card(tmp_path, pruned)
        assert ModelCard.load(tmp_path / CARD).data.base_model == "org/tiny"
    pruned.extra = {}


def test_names_that_are_markdown(pruned, tmp_path):
    pruned.extra = {"model": "/models/a`|\n# b"}
    write_card(tmp_path, pruned)
    assert "# `a___# b`, pruned" in (tmp_path / CARD).read_text()
    pruned.extra = {}


def test_the_name_on_the_hub(tmp_path):
    assert hub_name("org/tiny") == "org/tiny"
    snapshot = tmp_path / "models--org--tiny-1.5b--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert hub_name(str(snapshot)) == "org/tiny-1.5b--x"
    shutil.copytree(snapshot, tmp_path / "tiny")
    assert hub_name(str(tmp_path / "tiny")) is None
    (tmp_path / "m.gguf").touch()
    assert hub_name(str(tmp_path / "m.gguf")) is None


def test_the_licence_of_a_model_in_pickled_files(tmp_path):
    """Which is written by ``save_pretrained``, without the card."""
    model = make_model("llama")
    dense = save_dense(tmp_path / "dense")
    (dense / "model.safetensors").unlink()
    torch.save(model.state_dict(), dense / "pytorch_model.bin")
    (dense / CARD).write_text(BASE)
    (dense / "LICENSE").write_text("You may.")
    _, out = prune(dense, tmp_path / "out")
    assert ModelCard.load(out / CARD).data.license_name == "tiny-licence"
    assert (out / "LICENSE").read_text() == "You may."


# verify, --overwrite, pack


def test_verify_reads_the_card(place, tmp_path):
    out = shutil.copytree(place / "out", tmp_path / "out")
    text = (out / CARD).read_text()
    (out / CARD).write_text(text.replace("0.750000 zeros", "0.800000 zeros"))
    assert verify(out, load=False).problems == ["README.md: says 21 matrices, 0.800000 zeros; there are 21, 0.750000"]
    (out / CARD).unlink()
    assert verify(out, load=False).problems == ["README.md: missing"]
    (out / CARD).write_text("a card that somebody wrote")
    assert verify(out, load=False).problems == []


def test_a_card_that_was_edited_is_not_replaced(place, tmp_path, capsys):
    out = shutil.copytree(place / "out", tmp_path / "out")
    with (out / CARD).open("a") as card:
        card.write("\nMy own words.\n")
    status, _, error = call(capsys, "run", "--model", place / "dense", "--output", out, "--overwrite")
    assert status == 2
    assert "holds 'README.md', which ace-prune did not write or which has changed" in error


@pytest.mark.parametrize("card", ["own", BASE, None])
def test_pack_says_how_to_load_and_unpack_takes_it_back(card, place, tmp_path):
    out = shutil.copytree(place / "out", tmp_path / "out")
    if card is None:
        (out / CARD).unlink()
    elif card != "own":
        (out / CARD).write_text(card)
    pack(out, tmp_path / "packed", "bitmap")
    if card is not None:
        text = (tmp_path / "packed" / CARD).read_text()
        assert text.startswith((out / CARD).read_text())
        assert text.count("AutoModelForCausalLM.from_pretrained") == 1
        assert "in the format `bitmap`" in text
    unpack(tmp_path / "packed", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(out)


# The command


def requested(command: str):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    return shared.request_from(arguments)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--method balanced --pattern 2:4",
        "--method best",
        "--method published-sparsegpt --sparsity 0.7",
        "--method published-wanda",
        "--method 'published-wanda(batch_tokens=64)' --calibration wiki-mini",
        "--method 'published-wanda + distill' --calibration wiki-mini",
        "--method 'collect(order=block) + ria(exponent=0.7)' --bos never",
        "--group model --method magnitude",
        "--method 'allocate(range=0.1) + admm'",
        "--method 'swaps(max_swaps=7) + obs' --group row --skip q_proj --skip lm.head",
        "--method obs --group row --max-dense 0.3",
        "--method 'admm(damping=0.3) + train(epochs=3)' --dtype float32",
        "--method ace --save-stats stats.zip",
        "--method wanda --stats stats.zip",
        "--calibration a.jsonl --text-field content --nsamples 3 --seqlen 5 --seed 7 --evaluate never",
        "--calibration wiki-mini --bos always --evaluate b.txt",
    ],
)
def test_the_command_asks_for_the_same(options):
    request = requested(f"ace-prune run --model org/tiny --output x {options}")
    again = requested(run_command(request))
    assert again.config.to_dict() == request.config.to_dict()
    assert again.config.method == request.config.method
    assert again.options == request.options
    assert (again.calibration, again.dtype, again.model) == (request.calibration, request.dtype, request.model)


def test_no_command_for_what_no_command_can_ask(tmp_path):
    def score(weight, stats):
        return weight.abs()

    request = requested("ace-prune run --model org/tiny --output x")
    object.__setattr__(request, "config", PruneConfig(Score(score)))
    assert run_command(request) is None


def test_the_command_of_a_distillation(place):
    options = "--tokens 64 --learning-rate 0.001 --passes 2 --calibration other.txt --seqlen 8 --seed 3"
    arguments = ["heal", str(place / "out"), "--output", "x", *options.split()]
    request = heal_verb.request_from(build_parser().parse_args(arguments))
    recorded = recorded_text(read_report(place / "out"))
    words = shlex.split(heal_command(request.text, recorded, request.settings, request.options.tokens, None))[1:]
    words[1:2] = [str(place / "out")]
    again = heal_verb.request_from(build_parser().parse_args(words))
    assert (again.text, again.settings, again.options) == (request.text, request.settings, request.options)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("neurons=0.2", "fitted to what it gave with all of them"),
        ("neurons=0.2(score=published-flap)", "takes the mean of what goes (FLAP, arXiv 2312.11983)"),
        ("heads=0.5(score=published-wanda-sp)", r"Σ_i \|W_ij\| times the norm of the input"),
        ("blocks=2", "measured again after each"),
        ("blocks=2(score=published-shortgpt)", "measured once in the dense model (ShortGPT"),
    ],
)
def test_how_structures_were_chosen(part, words):
    text = removal_words(part)
    assert words in text
    assert ("fitted" in text) == (part == "neurons=0.2")
