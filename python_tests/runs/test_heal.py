"""``ace-prune heal``: inputs untouched, zeros kept, resumed runs write the same bytes, memory is bounded, refusals."""

import contextlib
import json
import random
import re
import shutil
import signal
import time
from dataclasses import replace

import every_class
import pytest
import torch
from children import heal_saving_often
from folders import fork, prune, save_dense, weights_bytes
from helpers import rest_nightly
from safetensors.torch import load_file, save_file
from tiny_models import make_model, make_tokenizer

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.engine import model_shape
from ace_ext.healing import HealSettings, part
from ace_ext.healing.progress import HealProgress
from ace_ext.models.blocks import find_blocks
from ace_ext.models.safetensors_files import Shards
from ace_ext.process_memory import parse_bytes
from ace_ext.records import PruneReport
from ace_ext.runs import heal, heal_journal, heal_run
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_memory import HealDemand
from ace_ext.runs.heal_models import dense_request, whole_bytes
from ace_ext.runs.heal_request import HealOptions, HealRequest
from ace_ext.runs.heal_text import recorded_text
from ace_ext.runs.model_source import open_source
from ace_ext.runs.output import read_report
from ace_ext.runs.verify import verify

SETTINGS = HealSettings(learning_rate=0.015, step_tokens=64, held_out=4)
SMALLER = replace(SETTINGS, learning_rate=0.0015)
"""For the larger model, whose weights are smaller."""
BUDGET = 1024
"""Tokens: 16 steps of 4 windows of 16."""


def write_text(path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    path.write_text(" ".join(random.Random(0).choices(words, k=4000)))


def make_pruned(place, family="llama", dtype=torch.bfloat16, **config):
    """``place/dense`` and ``place/pruned``, and the text that the latter was calibrated on."""
    dense = save_dense(place / "dense", family, dtype)
    write_text(place / "text.txt")
    prune(dense, place / "pruned", **config)
    return place / "pruned"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heal")
    make_pruned(folder)
    return folder


def request(folder, output, settings=SETTINGS, dense=None, device="cpu", **options):
    options.setdefault("tokens", None if "minutes" in options else BUDGET)
    text = recorded_text(read_report(folder))
    return HealRequest(str(folder), output, text, dense, settings, HealOptions(**options), torch.device(device))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", rest_nightly(["llama-tied", "mixtral"], ["llama", "llama-tied", "mixtral", "opt"]))
@pytest.mark.parametrize("config", [{}, {"method": "obs", "pattern": "2:4"}, {"skip": (r"[ko]_proj$",)}], ids=str)
def test_output(family, config, tmp_path):
    pruned = make_pruned(tmp_path, family, **config)
    before = contents(pruned), contents(tmp_path / "dense")
    report, path = heal_folder(request(pruned, tmp_path / "healed"))
    assert (contents(pruned), contents(tmp_path / "dense")) == before
    assert report.healing.loss_after < report.healing.loss_before
    assert verify(path).problems == verify(pruned).problems == []
    old, new = Shards(pruned), Shards(path)
    changed = {name for name in old.entries if not torch.equal(old.read(name), new.read(name))}
    zeros = 0
    for name in old.entries:
        assert torch.equal(old.read(name) == 0, new.read(name) == 0)
    for matrix in report.matrices:
        zeros += matrix.size - matrix.nonzero
    assert report.healing.zeros == zeros
    assert changed <= {f"{matrix.name}.weight" for matrix in report.matrices} or family == "mixtral"
    assert sorted(contents(path)) == sorted(before[0])
    assert PruneReport.from_json((path / "ace_report.json").read_text()) == report
    assert report.extra["healing"]["dense"] == str(tmp_path / "dense")
    assert not list(tmp_path.glob(".*"))


def test_the_field_of_the_text_is_that_of_the_run(place, tmp_path):
    """Another field may hold text too, so a default would be trained on in silence. Another file has its own."""
    words = (place / "text.txt").read_text().split()
    lines = [
        json.dumps({"text": " ".join(reversed(part)), "content": " ".join(part)})
        for part in (words[start : start + 40] for start in range(0, len(words), 40))
    ]
    for name in ("lines.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    found = str(tmp_path / "lines.jsonl")
    prune(place / "dense", tmp_path / "pruned", calibration={"source": found, "text_field": "content"})

    def healed(output, *more):
        arguments = ["heal", tmp_path / "pruned", "--output", tmp_path / output, "--tokens", 256, "--step-tokens", 64]
        assert main([*map(str, arguments), *more]) == 0
        return read_report(tmp_path / output).extra["healing"]

    same, named = healed("same"), healed("named", "--text-field", "content")
    assert same == named | {"peak_memory_bytes": same["peak_memory_bytes"]}
    assert same["calibration"]["text_field"] == "content"
    for output, more, command in (
        ("field", ["--text-field", "text"], "--text-field text"),
        ("file", ["--calibration", str(tmp_path / "other.jsonl")], "--calibration other.jsonl --text-field text"),
    ):
        other = healed(output, *more)
        assert "text_field" not in other["calibration"]
        assert other["calibration"]["sha256"] != same["calibration"]["sha256"]
        assert other["command"].endswith(command)


def test_a_healed_folder_can_be_healed_again(place, tmp_path):
    first, path = heal_folder(request(place / "pruned", tmp_path / "once"))
    second, _ = heal_folder(request(path, tmp_path / "twice"))
    assert second.healing.loss_before == first.healing.loss_after
    assert second.healing.loss_after < first.healing.loss_after


def test_a_dense_model_in_another_form(place, tmp_path):
    """Files that must be loaded whole, and the same weights in several files: the output has the same bytes."""
    shutil.copytree(place / "dense", tmp_path / "bin")
    (tmp_path / "bin/model.safetensors").unlink()
    torch.save(make_model("llama", torch.bfloat16).state_dict(), tmp_path / "bin/pytorch_model.bin")
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(place / "dense/tokenizer.json", tmp_path / "shards")
    shutil.copy(place / "dense/tokenizer_config.json", tmp_path / "shards")
    outputs = [heal_folder(request(place / "pruned", tmp_path / "0"))[1]]
    for name in ("bin", "shards"):
        dense = str(tmp_path / name)
        outputs.append(heal_folder(request(place / "pruned", tmp_path / f"of-{name}", dense=dense))[1])
    assert weights_bytes(outputs[0]) == weights_bytes(outputs[1]) == weights_bytes(outputs[2])


def test_minutes_are_turned_into_tokens_once(place, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(heal, "tokens_within", lambda seconds, *_: asked.append(seconds) or 300)
    report, path = heal_folder(request(place / "pruned", tmp_path / "out", minutes=0.5))
    assert asked == [30.0]
    assert (report.healing.tokens, report.healing.steps) == (320, 5)
    other = heal_folder(request(place / "pruned", tmp_path / "same", tokens=300))[1]
    assert weights_bytes(path) == weights_bytes(other)


def test_more_minutes_take_more_tokens(place, tmp_path):
    tokens = [
        heal_folder(request(place / "pruned", tmp_path / str(minutes), minutes=minutes))[0].healing.tokens
        for minutes in (1e-6, 0.02)
    ]
    assert tokens[0] == 64 < tokens[1]


@pytest.mark.parametrize("shown", [False, True])
def test_the_model_may_write_its_text(shown, place, tmp_path, capsys):
    asked = request(place / "pruned", tmp_path / "out", tokens=256)
    report, _ = heal_folder(replace(asked, text=replace(asked.text, source="self")), HealProgress(shown))
    assert ("writing text" in capsys.readouterr().err) is shown
    assert report.extra["healing"]["calibration"]["source"] == "self"
    assert report.healing.loss_after < report.healing.loss_before


# --- the command line -------------------------------------------------------------------------------------------------


def command(place, output, *more, rate=0.015):
    options = ["--step-tokens", 64, "--held-out", 4, "--learning-rate", rate, "--tokens", BUDGET, "--device", "cpu"]
    return [str(part) for part in ("heal", place / "pruned", "--output", output, *options, *more)]


def test_command_line(place, tmp_path, capsys):
    log, page = tmp_path / "log.jsonl", tmp_path / "page.html"
    assert main([*command(place, tmp_path / "out"), "--log-json", str(log), "--report", str(page)]) == 0
    printed = capsys.readouterr()
    assert "distilled on 1,024 tokens in 16 steps" in printed.out
    assert re.search(r"1 x 1,024 tokens in 16 steps, all blocks together; needs about \d", printed.err)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert [kinds.count(kind) for kind in ("teacher", "start", "step", "check", "end")] == [3, 1, 16, 5, 1]
    assert "Distillation" in page.read_text()
    _, path = heal_folder(request(place / "pruned", tmp_path / "python"))
    assert weights_bytes(path) == weights_bytes(tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_json_on_stdout(place, tmp_path, capsys):
    assert main([*command(place, tmp_path / "out"), "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["healing"]["steps"] == 16
    assert printed.err == ""


# --- refusals ---------------------------------------------------------------------------------------------------------


def other_dense(place, change):
    folder = place / "other"
    shutil.copytree(place / "dense", folder)
    change(folder)
    return folder


def with_other_seed(folder):
    make_model("llama", torch.bfloat16, seed=1).save_pretrained(folder)


def with_other_shape(folder):
    make_model("qwen2", torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_seed, r"dense must be the model that was pruned: \S+ of .*other.* differs from .*pruned"),
        (with_other_shape, r"dense must be the model that was pruned: \S+bias is \(\d+,\) in .*other.*, and None in"),
        (shutil.rmtree, "model '.*other' is not a folder"),
    ],
    ids=["other-weights", "other-shape", "not-there"],
)
def test_another_dense_model_is_refused(change, message, tmp_path):
    make_pruned(tmp_path)
    dense = other_dense(tmp_path, change)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        heal_folder(request(tmp_path / "pruned", tmp_path / "out", dense=str(dense)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dense_model_that_has_gone(tmp_path):
    pruned = make_pruned(tmp_path)
    (tmp_path / "dense").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"dense: the report names a model .*; give it with --dense"):
        heal_folder(request(pruned, tmp_path / "out"))
    report, _ = heal_folder(request(pruned, tmp_path / "out", dense=str(tmp_path / "moved")))
    assert report.healing.loss_after < report.healing.loss_before


def test_a_text_that_is_too_short_is_found_before_pruning(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    monkeypatch.setattr("ace_ext.runs.pipeline.prune_model", None)  # so that nothing can prune
    with pytest.raises(InputError, match="none is left to train on"):
        prune(dense, tmp_path / "out", calibration={"seqlen": 64}, method="wanda + distill(tokens=256)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"tokens": 9, "minutes": 1.0}, "give tokens, minutes or windows, only one of them"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
        ({"minutes": float("nan")}, "minutes must be more than 0"),
    ],
)
def test_budgets_that_are_none(options, message, place, tmp_path):
    with pytest.raises(InputError, match=message):
        heal_folder(request(place / "pruned", tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pruned", "dense"])
def test_an_input_is_never_replaced(name, tmp_path):
    pruned = make_pruned(tmp_path)
    before = contents(tmp_path / name)
    with pytest.raises(InputError, match=r"overlaps an input of this run, .*; give a folder elsewhere"):
        heal_folder(request(pruned, tmp_path / name, overwrite=True))
    assert contents(tmp_path / name) == before


def test_an_output_that_exists(place, tmp_path):
    heal_folder(request(place / "pruned", tmp_path / "out"))
    with pytest.raises(InputError, match="pass --overwrite"):
        heal_folder(request(place / "pruned", tmp_path / "out"))
    heal_folder(request(place / "pruned", tmp_path / "out", overwrite=True))


def test_a_folder_that_was_not_pruned(place, tmp_path):
    with pytest.raises(InputError, match=r"has no ace_report\.json"):
        main(["heal", str(place / "dense"), "--output", str(tmp_path / "out")]) and heal_folder(
            request(place / "dense", tmp_path / "out")
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            1.0,
            r"has changed since ace-prune wrote it: model\S+: \d+ non-zeros, but .* \(and 1 more, see ace-prune verify",
        ),
        (float("nan"), "holds NaN or infinity"),
    ],
    ids=["a-zero-filled", "nan"],
)
def test_a_pruned_folder_whose_weights_were_changed(value, message, tmp_path):
    """Its report and card would claim zeros that the files do not have."""
    pruned = make_pruned(tmp_path)
    tensors = load_file(pruned / "model.safetensors")
    row = tensors["model.layers.0.mlp.up_proj.weight"][0]
    row[(row == 0).nonzero()[0]] = value
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        heal_folder(request(pruned, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_more_passes_than_the_budget_has_steps(place, tmp_path):
    """The run would train on more tokens than were asked for, or take longer."""
    many = replace(SETTINGS, passes=17)
    with pytest.raises(InputError, match=r"passes must be at most 16 for 1,024 tokens"):
        heal_folder(request(place / "pruned", tmp_path / "out", many))
    with pytest.raises(InputError, match=r"passes must be at most 1 for 64 tokens: .* more tokens or minutes"):
        heal_folder(request(place / "pruned", tmp_path / "out", many, minutes=1e-6))
    assert not list(tmp_path.iterdir())


def test_a_card_that_was_edited_is_no_reason_to_refuse(tmp_path):
    pruned = make_pruned(tmp_path)
    (pruned / "README.md").unlink()
    report, _ = heal_folder(request(pruned, tmp_path / "out"))
    assert report.healing.loss_after < report.healing.loss_before


# --- memory -----------------------------------------------------------------------------------------------------------


class Free:
    """A process that takes nothing, so that the model's own bytes decide; records how each run was divided."""

    def __init__(self, monkeypatch):
        self.divisions = []
        monkeypatch.setattr(heal, "process_bytes", lambda *_: 0)
        kept = heal.HealContext

        def noted(**given):
            self.divisions.append(given)
            return kept(**given)

        divide = heal.HealDemand.divide

        def divided(demand, *given):
            self.divisions.append(divide(demand, *given)[0])
            return divide(demand, *given)

        monkeypatch.setattr(heal.HealDemand, "divide", divided)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model of 7 MB whose blocks take 1.1 MB each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("larger")
    dense = save_dense(folder / "dense")
    write_text(folder / "text.txt")
    torch.manual_seed(0)
    size = {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)).to(torch.bfloat16).save_pretrained(dense)
    prune(dense, folder / "pruned")
    return folder


@pytest.mark.nightly
def test_a_limit_decides_how_many_blocks_are_trained_together(larger, tmp_path, monkeypatch):
    free = Free(monkeypatch)
    monkeypatch.setattr(model_shape, "slow_dtypes", frozenset)  # what is converted would hide how large the states are
    heal_folder(request(larger / "pruned", tmp_path / "all", SMALLER, tokens=256))
    assert (free.divisions[-1].parts, free.divisions[-1].resident, free.divisions[-1].graphs) == (1, True, 6)
    tokens = {"tokens": 4 * BUDGET}  # so that their states take more than the megabyte that "at least" is rounded to
    fewer_steps = replace(SMALLER, step_tokens=128)
    with pytest.raises(
        InputError, match=r"max-memory must be at least \d+MB here \(got 1MB\).*lower --step-tokens"
    ) as e:
        heal_folder(request(larger / "pruned", tmp_path / "none", fewer_steps, max_memory=10**6, **tokens))
    least = parse_bytes(str(e.value).split("at least ")[1].split(" ")[0])
    assert not (tmp_path / "none").exists()
    found = []
    for limit in (least, 3 * least):
        report, path = heal_folder(
            request(larger / "pruned", tmp_path / str(limit), fewer_steps, max_memory=limit, **tokens)
        )
        assert verify(path).problems == []
        assert report.healing.loss_after < report.healing.loss_before
        found.append(free.divisions[-1])
        assert report.healing.parts == found[-1].parts
    assert found[0].parts == 6
    assert not found[0].resident
    assert not found[0].states
    assert 1 < found[1].parts < 6


def test_a_dense_model_that_must_be_loaded_whole_counts(place, tmp_path):
    report = read_report(place / "pruned")
    shutil.copytree(place / "dense", tmp_path / "bin")
    (tmp_path / "bin/model.safetensors").unlink()
    asked = request(place / "pruned", tmp_path / "out")
    model = make_model("llama", torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    sizes = [
        whole_bytes(open_source(dense_request(str(folder), asked, report), weights=False))
        for folder in (place / "dense", tmp_path / "bin")
    ]
    assert sizes[0] == 0
    assert sizes[1] >= sum(parameter.nbytes for parameter in model.parameters())
    demand = HealDemand.of(model, find_blocks(model), [torch.zeros(4, 16)], dense=10**9)
    peak = demand.peak(heal.Division(), 0)
    assert (peak.phase, peak.model) == ("dense model", 10**9)


def test_where_weights_and_states_are_changes_no_bit(larger, tmp_path, monkeypatch):
    outputs = []
    for resident in (True, False):
        for states in (True, False):
            division = heal.Division(2, resident, states)
            monkeypatch.setattr(heal.HealDemand, "divide", lambda *_, d=division: (d, heal.Estimate()))
            out = tmp_path / f"{resident}-{states}"
            _, path = heal_folder(request(larger / "pruned", out, SMALLER, tokens=256))
            outputs.append(weights_bytes(path))
    assert all(output == outputs[0] for output in outputs)


# --- killed and resumed -----------------------------------------------------------------------------------------------


def start(arguments, division):
    return fork(heal_saving_often, [*arguments, "--quiet"], *division)


def progress(unfinished):
    """Blocks of the dense model and steps that are on the disk."""
    with contextlib.suppress(FileNotFoundError):
        notes = json.loads((unfinished / "state.json").read_text())["notes"]
        return notes.get("teacher", 0) + notes.get("step", 0)
    return 0


@pytest.mark.parametrize(
    "division",
    [
        pytest.param((1, True, True), id="together", marks=pytest.mark.nightly),
        pytest.param((3, False, False), id="windows-from-files"),
    ],
)
def test_killed_and_resumed(division, larger, tmp_path):
    """Killed again and again, each time a little after more was done, until it is finished."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--tokens", 512)  # 8 steps
    child = start(command(larger, whole, *options, rate=0.0015), division)
    child.join(300)
    assert child.exitcode == 0
    rng = random.Random(0)
    kills, seen = 0, [0]
    while not out.exists():
        child = start(command(larger, out, *options, "--resume", rate=0.0015), division)
        aim = seen[-1] + rng.randrange(1, 5)
        while child.is_alive() and progress(tmp_path / ".out.unfinished") < aim and not out.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        seen.append(progress(tmp_path / ".out.unfinished"))
    assert kills >= 2
    assert seen[:-1] == sorted(seen[:-1])
    assert weights_bytes(out) == weights_bytes(whole) != weights_bytes(larger / "pruned")
    reports = [read_report(folder).healing for folder in (out, whole)]
    assert replace(reports[0], seconds=0.0) == replace(reports[1], seconds=0.0)


def interrupted(place, output, monkeypatch, after=5, **options):
    """Runs until a number of steps are done and saved, then stops with an error of the disk."""
    monkeypatch.setattr(heal_journal, "SAVE_SECONDS", 0)
    monkeypatch.setattr(heal_journal, "SAVE_SHARE", 0)
    save = heal_journal.HealJournal.save

    def stopping(journal, tensors=()):
        save(journal, tensors)
        if journal.notes.get("step") == after:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(heal_journal.HealJournal, "save", stopping)
        with pytest.raises(InputError, match="No space left on device; free some space and continue with --resume"):
            heal_folder(request(place / "pruned", output, **options))


def test_resume_refuses_another_run(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(place, out, monkeypatch)
    for changed, message in (
        ({"settings": replace(SETTINGS, learning_rate=0.005)}, r"settings.learning_rate was 0.015, now 0.005"),
        ({"tokens": 2048}, r"budget.tokens was 1024, now 2048"),
    ):
        with pytest.raises(InputError, match=f"resume: the unfinished run differs from this one: .*{message}"):
            heal_folder(request(place / "pruned", out, resume=True, **changed))
    report, _ = heal_folder(request(place / "pruned", out, resume=True))
    assert report.healing.steps == 16


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ("model/model.safetensors", r"model\.safetensors has changed"),
        ("model/config.json", r"config\.json has changed"),
        ("teacher-*.bin", r"teacher-\d\.bin has changed"),
        ("training-*/1.safetensors", r"1\.safetensors has changed"),
    ],
)
def test_changed_bytes_are_named(found, named, place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(place, out, monkeypatch)
    notes = json.loads((tmp_path / ".out.unfinished" / "state.json").read_text())["notes"]
    file = sorted((tmp_path / ".out.unfinished").glob(found))[notes["teacher"] % 2 if "teacher" in found else 0]
    data = bytearray(file.read_bytes())
    data[-1 if "safetensors" in found else 60] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"resume: .*{named} .*checksum differs.*start over without --resume"):
        heal_folder(request(place / "pruned", out, resume=True))
    heal_folder(request(place / "pruned", out))


def test_a_trained_block_that_changes_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setattr(heal.HealDemand, "divide", lambda *_: (heal.Division(3), heal.Estimate()))
    out = tmp_path / "out"
    interrupted(place, out, monkeypatch, after=8)  # in the second window
    model = tmp_path / ".out.unfinished" / "model" / "model.safetensors"
    length = int.from_bytes(model.read_bytes()[:8], "little")
    header = json.loads(model.read_bytes()[8 : 8 + length])
    data = bytearray(model.read_bytes())
    data[8 + length + header["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0]] ^= 1
    model.write_bytes(data)
    with pytest.raises(InputError, match=r"resume: model\.layers\.0 in .* has changed"):
        heal_folder(request(place / "pruned", out, resume=True))


def test_resume_refuses_another_text(tmp_path, monkeypatch):
    make_pruned(tmp_path)
    interrupted(tmp_path, tmp_path / "out", monkeypatch)
    (tmp_path / "text.txt").write_text("over the lazy dog " * 2000 + (tmp_path / "text.txt").read_text())
    with pytest.raises(InputError, match=r"resume: the unfinished run differs from this one: text\.sha256 was"):
        heal_folder(request(tmp_path / "pruned", tmp_path / "out", resume=True))


def test_a_finished_run_is_not_that_of_another_text(tmp_path):
    make_pruned(tmp_path)
    heal_folder(request(tmp_path / "pruned", tmp_path / "out"))
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text + "over the lazy dog")
    with pytest.raises(InputError, match=r"is complete, but of a run with other arguments \(text\.sha256 was"):
        heal_folder(request(tmp_path / "pruned", tmp_path / "out", resume=True))
    (tmp_path / "text.txt").write_text(text)
    heal_folder(request(tmp_path / "pruned", tmp_path / "out", resume=True))


def test_resume_refuses_another_tokenizer(tmp_path, monkeypatch):
    """The file of the text is the same, and its tokens are not."""
    make_pruned(tmp_path)
    interrupted(tmp_path, tmp_path / "out", monkeypatch)
    file = tmp_path / "pruned" / "tokenizer.json"
    file.write_text(file.read_text().replace('"quick"', '"sluggish"'))
    monkeypatch.setattr(heal_run, "check_unchanged", lambda folder: None)
    with pytest.raises(InputError, match="resume: the text has changed"):
        heal_folder(request(tmp_path / "pruned", tmp_path / "out", resume=True))


@pytest.mark.parametrize("when", rest_nightly([9], [3, 9]))
def test_blocks_that_share_states_are_run_again(when, tmp_path, monkeypatch):
    """What blocks of Gemma 4 hand on is in no file. Stopped at a save after three of its four blocks, or at a step."""
    dense = tmp_path / "dense"
    every_class.build("gemma4_text", torch.bfloat16).save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    write_text(tmp_path / "text.txt")
    prune(dense, tmp_path / "pruned")
    save, saves = heal_journal.HealJournal.save, []

    def stopping(journal, *tensors):
        save(journal, *tensors)
        saves.append(journal)
        if len(saves) == when:
            raise KeyboardInterrupt

    monkeypatch.setattr(heal_journal.HealJournal, "due", lambda _: True)
    _, whole = heal_folder(request(tmp_path / "pruned", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(heal_journal.HealJournal, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            heal_folder(request(tmp_path / "pruned", tmp_path / "out"))
    _, resumed = heal_folder(request(tmp_path / "pruned", tmp_path / "out", resume=True))
    assert weights_bytes(resumed) == weights_bytes(whole)


def test_without_resume_a_run_starts_over(place, tmp_path, monkeypatch):
    interrupted(place, tmp_path / "out", monkeypatch)
    _, path = heal_folder(request(place / "pruned", tmp_path / "out"))
    _, whole = heal_folder(request(place / "pruned", tmp_path / "whole"))
    assert weights_bytes(path) == weights_bytes(whole)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]


def test_a_resumed_run_keeps_its_lower_rate(place, tmp_path, monkeypatch):
    """Interrupted right after the measurement that lowered the rate: Adam has no state to save then. The loss of so
    small a model does not become 1.5 times that of the start."""
    monkeypatch.setattr(part, "MUCH_WORSE", 1.0)
    settings = replace(SETTINGS, learning_rate=1e6)
    whole_report, whole = heal_folder(request(place / "pruned", tmp_path / "whole", settings))
    interrupted(place, tmp_path / "out", monkeypatch, after=4, settings=settings)
    report, path = heal_folder(request(place / "pruned", tmp_path / "out", settings, resume=True))
    assert report.healing.backed_off == whole_report.healing.backed_off
    assert report.healing.backed_off[:2] == [4, 8]
    assert report.healing.checks == whole_report.healing.checks
    assert weights_bytes(path) == weights_bytes(whole)


def test_a_resumed_run_keeps_its_windows(place, tmp_path, monkeypatch):
    """A run that trained blocks in windows goes on so, although more memory is there now."""
    monkeypatch.setattr(heal.HealDemand, "divide", lambda *_: (heal.Division(3), heal.Estimate()))
    interrupted(place, tmp_path / "out", monkeypatch)
    _, whole = heal_folder(request(place / "pruned", tmp_path / "whole"))
    monkeypatch.undo()
    report, path = heal_folder(request(place / "pruned", tmp_path / "out", resume=True))
    assert report.healing.parts == 3
    assert weights_bytes(path) == weights_bytes(whole)
