"""A killed run is resumed and writes the same bytes as an uninterrupted one; an older output is never lost."""

import fcntl
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from folders import command, fork_run, prune, save_dense, tree, weights_bytes
from tiny_models import make_model

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.data import generate
from ace_ext.fingerprint import differences, fingerprint_of_files
from ace_ext.runs import pipeline, unfinished
from ace_ext.runs.unfinished import recover
from ace_ext.runs.workspace import Workspace

# Killed

MODES = {
    "resident": (),
    "resident-stages": ("--method", "collect(batch_tokens=256) + wanda"),
    "disk": ("--offload", "disk"),
    "disk-stages": ("--offload", "disk", "--method", "collect(batch_tokens=256) + wanda"),
    "block-order": ("--method", "collect(order=block) + wanda", "--offload", "disk"),
    "trained": ("--method", "admm + train(epochs=1)"),
    "quantized": ("--method", "admm + quantize(bits=4, embeddings=8)", "--offload", "disk"),
    "removed": ("--remove", "neurons=0.25", "--pattern", "2:4"),
    "allocated": ("--method", "allocate + wanda + swaps(gram=cosine)", "--offload", "disk"),
}

OFTEN = ("disk-stages", "trained")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of 8 layers, which a run takes a second or two to walk over."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("deep")
    dense = save_dense(place / "dense")
    (dense / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=True, **size)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(dense, max_shard_size="200KB")
    return dense


def finished_blocks(unfinished) -> int:
    try:
        return json.loads((unfinished / "state.json").read_text())["finished"]
    except FileNotFoundError:
        return 0


def kill_after(child, delay: float) -> bool:
    """Kills the child after a number of seconds; returns whether it was still running."""
    child.join(delay)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def wait_for_block(child, unfinished, blocks: int) -> None:
    """Waits until a number of blocks are done, or the child has ended."""
    while child.is_alive() and finished_blocks(unfinished) < blocks:
        time.sleep(0.001)


def finish(child) -> None:
    child.join(300)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("mode", "hidden_in_files"),
    [
        pytest.param(
            mode,
            in_files,
            marks=[pytest.mark.nightly] if (in_files == place % 2 or mode not in OFTEN) else [],
            id=f"{mode}-hidden-in-{'files' if in_files else 'memory'}",
        )
        for place, mode in enumerate(MODES)
        for in_files in (False, True)
    ],
)
def test_killed_at_random_and_resumed(mode, hidden_in_files, deep, tmp_path):
    """Kills fall anywhere: at any time of a run, and (so that it makes progress on any machine) a little after a
    block more is done."""
    rng = random.Random(f"{mode} {hidden_in_files}")
    options = [*command(deep, tmp_path / "out")[3:], *MODES[mode], "--nsamples", 64, "--seqlen", 64]
    finish(fork_run(["--version"]))  # the server has imported all then
    start = time.perf_counter()
    finish(fork_run([*options, "--output", tmp_path / "whole"], hidden_in_files))
    length = time.perf_counter() - start
    unfinished = tmp_path / ".out.unfinished"
    kills, seen = 0, [0]
    for attempt in range(5):
        child = fork_run([*options, "--resume"], hidden_in_files)
        if attempt % 2:
            kills += kill_after(child, rng.uniform(0, 0.5) * length)
        else:
            wait_for_block(child, unfinished, seen[-1] + 1)
            kills += kill_after(child, rng.uniform(0, 0.1) * length)
        if (tmp_path / "out").exists():  # done, even if the kill fell before the process had ended
            recover(tmp_path / "out")  # what every run does first: removes what a kill left after the last rename
            break
        seen.append(finished_blocks(unfinished))
    else:
        finish(fork_run([*options, "--resume"], hidden_in_files))
    assert kills >= 2
    assert seen == sorted(seen)
    assert 1 <= seen[-1] <= 8, "no kill fell between two blocks"
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "whole") != weights_bytes(deep)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "whole"]


def test_killed_before_the_first_block(deep, tmp_path):
    """Nothing is recorded then, so a resumed run starts over."""
    options = command(deep, tmp_path / "out", "--resume")[3:]
    child = fork_run(options)
    while not (tmp_path / ".out.unfinished").exists() and child.is_alive():
        time.sleep(0.001)
    assert kill_after(child, 0)
    assert not (tmp_path / "out").exists()
    finish(fork_run(options))
    _, whole = prune(deep, tmp_path / "whole")
    assert weights_bytes(tmp_path / "out") == weights_bytes(whole)


# Stopped at a chosen place, in this process


class Crash(BaseException):
    """Not a subclass of Exception, so that no handler cleans up, as after a kill."""


def crash_after(monkeypatch, blocks: int):
    """Crashes when a number of blocks are done, before the state of the next one is written."""
    real, done = Workspace._write_state, []

    def write(self, *arguments):
        if len(done) == blocks:
            raise Crash
        done.append(None)
        return real(self, *arguments)

    monkeypatch.setattr(Workspace, "_write_state", write)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A dense model, and a run of it that died in its third block, that block's weights written and not counted."""
    dense = save_dense(tmp_path / "dense")
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out")
    assert finished_blocks(tmp_path / ".out.unfinished") == 2
    return dense


RESUME = {"resume": True}


@pytest.mark.parametrize("offload", ["disk", "none"])
def test_goes_on_and_reports_all_blocks(offload, stopped, tmp_path):
    """A resumed run may keep weights and hidden states elsewhere (memory or disk) than the first run."""
    whole_report, whole = prune(stopped, tmp_path / "whole")
    report, out = prune(stopped, tmp_path / "out", {**RESUME, "offload": offload})
    assert weights_bytes(out) == weights_bytes(whole)
    assert report.matrices == whole_report.matrices
    assert [block.name for block in report.blocks] == [f"model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("offload", ["disk", "none"])
def test_a_mixture_goes_on(offload, tmp_path, monkeypatch):
    """Its fused experts lie in the files one by one."""
    dense, run, text = save_dense(tmp_path / "dense", "mixtral"), {"offload": offload}, {"source": "tokens"}
    _, whole = prune(dense, tmp_path / "whole", run, text)
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", run, text)
    _, out = prune(dense, tmp_path / "out", {**run, **RESUME}, text)
    assert weights_bytes(out) == weights_bytes(whole)


def test_only_the_rest_is_pruned(stopped, tmp_path, monkeypatch):
    held = []
    real = pipeline.OffloadedBlocks.loaded
    monkeypatch.setattr(pipeline.OffloadedBlocks, "loaded", lambda self, i: held.append(i) or real(self, i))
    prune(stopped, tmp_path / "out", {**RESUME, "offload": "disk"})
    assert held == [0, 0, 1, 2, 0, 2]  # the trial of the model: how blocks are called, and each once; then as before


def test_without_resume_it_starts_over(stopped, tmp_path):
    _, out = prune(stopped, tmp_path / "out", sparsity=0.25)
    _, whole = prune(stopped, tmp_path / "whole", sparsity=0.25)
    assert weights_bytes(out) == weights_bytes(whole)


def change_weights(folder):
    make_model("llama", torch.bfloat16, seed=1).save_pretrained(folder)


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def change_code(folder):
    (folder / "modeling_own.py").write_text("# what --trust-remote-code would run\n")


@pytest.mark.parametrize(
    ("change", "calibration", "config", "named"),
    [
        (change_weights, {}, {}, r"model\.files\.model\.safetensors was"),
        (change_code, {}, {}, r"model\.files\.modeling_own\.py was null"),
        (change_config, {}, {}, r"model\.files\.config\.json was"),
        (None, {"seed": 1}, {}, r"calibration\.seed was 0, now 1; calibration\.sha256 was"),
        (None, {"nsamples": 9}, {}, r"calibration\.nsamples was 8, now 9"),
        (None, {}, {"sparsity": 0.6}, r"config\.sparsity was 0\.5, now 0\.6"),
        (None, {}, {"method": "stade"}, r'config\.method was "wanda", now "stade"'),
        (None, {}, {"method": "collect(order=block) + wanda"}, r'was "wanda", now "collect\(order=block\) \+ wanda"'),
        (None, {"dtype": "float32"}, {}, r'model\.dtype was "auto", now "float32"'),
    ],
)
def test_another_run_is_not_resumed(change, calibration, config, named, stopped, tmp_path):
    if change:
        change(stopped)
    with pytest.raises(
        InputError, match=rf"resume: the unfinished run differs from this one: .*{named}.*start over without"
    ):
        prune(stopped, tmp_path / "out", RESUME, calibration, **config)
    assert finished_blocks(tmp_path / ".out.unfinished") == 2  # what there is stays


def test_another_version_does_not_resume(stopped, tmp_path, monkeypatch):
    before = pipeline.versions()
    monkeypatch.setattr(pipeline, "versions", lambda: {**before, "ace_ext": "0.0"})
    with pytest.raises(InputError, match=rf'versions\.ace_ext was "{before["ace_ext"]}", now "0\.0"'):
        prune(stopped, tmp_path / "out", RESUME)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: "\xff",
        lambda text: text.replace('"finished": 2', '"finished": 3'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"matrices": [{', '"matrices": [7, {'),
    ],
)
def test_a_damaged_state_is_named(damage, stopped, tmp_path):
    path = tmp_path / ".out.unfinished" / "state.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text), encoding="latin-1")
    with pytest.raises(InputError, match=r"resume: .*state\.json is damaged .*start over without --resume"):
        prune(stopped, tmp_path / "out", RESUME)
    _, out = prune(stopped, tmp_path / "out")
    assert weights_bytes(out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finished": 3}, "3 blocks done, 2 reported"),
        ({"finished": None}, "int"),
        ({"format": 2}, "format 2, not 1"),
        ({"fingerprint": 7}, "int"),
        ({"blocks": [7, 7]}, "int"),
        ({"sums": {}}, "rest"),
    ],
    ids=str,
)
def test_a_state_that_contradicts_itself_is_named(changed, message, stopped, tmp_path):
    """Its checksum fits: it stands for a file that another version wrote."""
    path = tmp_path / ".out.unfinished" / "state.json"
    state = {**json.loads(path.read_text()), **changed}
    del state["sha256"]
    path.write_text(json.dumps({**state, "sha256": unfinished._sha256(state)}))
    with pytest.raises(
        InputError, match=rf"resume: .*state\.json is damaged \(.*{message}.*start over without --resume"
    ):
        prune(stopped, tmp_path / "out", RESUME)


def test_short_hidden_states_are_named(stopped, tmp_path):
    (path,) = (tmp_path / ".out.unfinished").glob("hidden-0-0.bin")
    os.truncate(path, 10)
    with pytest.raises(InputError, match=r"hidden-0-0\.bin ends before the states of batch 0; start over"):
        prune(stopped, tmp_path / "out", RESUME)


def test_nothing_to_resume_simply_starts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    _, out = prune(dense, tmp_path / "out", RESUME)
    _, whole = prune(dense, tmp_path / "whole")
    assert weights_bytes(out) == weights_bytes(whole)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "out", "text.txt", "whole"]


def test_group_model_starts_over(tmp_path, monkeypatch):
    """The group ``model`` prunes only at the end, so there is nothing to resume."""
    dense = save_dense(tmp_path / "dense")
    with monkeypatch.context() as patch:
        crash_after(patch, 1)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", group="model")
    report, out = prune(dense, tmp_path / "out", RESUME, group="model")
    whole_report, whole = prune(dense, tmp_path / "whole", group="model")
    assert weights_bytes(out) == weights_bytes(whole)
    assert report.matrices == whole_report.matrices


# The end of a run, and an older output


@pytest.fixture
def replacing(tmp_path):
    """A dense model and an older output that a run is to replace."""
    dense = save_dense(tmp_path / "dense")
    _, out = prune(dense, tmp_path / "out", sparsity=0.25)
    return dense, weights_bytes(out)


def crash_in_finish(monkeypatch, renames: int):
    """Crashes after ``renames`` of the two renames that replace the old output."""
    real, done = os.replace, []

    def replace(source, target):
        if os.path.basename(target) in ("old", "out"):
            if len(done) == renames:
                raise Crash
            done.append(None)
        real(source, target)

    monkeypatch.setattr("ace_ext.runs.unfinished.os.replace", replace)
    if renames == 2:
        monkeypatch.setattr(Workspace, "remove", lambda self: (_ for _ in ()).throw(Crash()))


def test_the_lock_is_the_last_file_that_is_removed(tmp_path, monkeypatch):
    """Once it is gone another run can lock the folder, and removing by name could then remove that run's files."""
    dense, left, real = save_dense(tmp_path / "dense"), [], shutil.rmtree

    def rmtree(path, **options):
        if path == tmp_path / ".out.unfinished":
            left.append([file.name for file in path.iterdir()])
        real(path, **options)

    monkeypatch.setattr("ace_ext.runs.unfinished.shutil.rmtree", rmtree)
    prune(dense, tmp_path / "out", {"offload": "disk"})
    assert left == [["lock"]]
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_folder_that_another_run_made_meanwhile_is_not_removed(tmp_path, monkeypatch):
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    monkeypatch.setattr("ace_ext.runs.unfinished._locked", lambda *_: None)  # the one that was there is gone
    unfinished.discard(tmp_path / "out")
    (tmp_path / "out").mkdir()
    recover(tmp_path / "out")
    assert (folder / "state.json").exists()


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("then", ["resume", "over", "refused"])
def test_a_crash_around_the_renames(renames, then, replacing, tmp_path, monkeypatch):
    dense, old = replacing
    with monkeypatch.context() as patch:
        crash_in_finish(patch, renames)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", {"overwrite": True})
    _, whole = prune(dense, tmp_path / "whole")
    if then == "refused":  # without --overwrite what is there is never replaced, and it is there
        if renames == 2:  # it is the new one: the run was done
            prune(dense, tmp_path / "out", RESUME)
            assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "out", "text.txt", "whole"]
        else:
            with pytest.raises(InputError, match=r"other arguments \(config\.sparsity was 0\.25, now 0\.5\)"):
                prune(dense, tmp_path / "out", RESUME)
        assert weights_bytes(tmp_path / "out") == (weights_bytes(whole) if renames == 2 else old)
        return
    prune(dense, tmp_path / "out", {"overwrite": True, "resume": then == "resume"})
    assert weights_bytes(tmp_path / "out") == weights_bytes(whole)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "out", "text.txt", "whole"]


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    arguments = command(dense, tmp_path / "out", "--resume", "--evaluate", "never")[3:]
    assert main(arguments) == 0
    assert "already complete" not in capsys.readouterr().err
    before = tree(tmp_path / "out")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"ace-prune: {str(tmp_path / 'out')!r} is already complete; nothing was done" in printed.err
    assert "sparsity 0.5000" in printed.out
    assert main([*arguments, "--sparsity", "0.6"]) == 2
    assert (
        "is complete, but of a run with other arguments (config.sparsity was 0.5, now 0.6)" in capsys.readouterr().err
    )
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("damage", [None, "cut", "changed"])
def test_a_resumed_run_takes_the_text_that_the_model_wrote(tmp_path, monkeypatch, damage):
    dense = save_dense(tmp_path / "dense")
    own = {"source": "self", "nsamples": 4}
    _, whole = prune(dense, tmp_path / "whole", calibration=own)
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", calibration=own)
    text = tmp_path / ".out.unfinished" / pipeline.TEXT
    if damage == "cut":
        text.write_bytes(text.read_bytes()[:-8])
    elif damage == "changed":
        flip(text, 8)
    written = []
    real = generate.self_generated
    monkeypatch.setattr(generate, "self_generated", lambda *args, **kw: written.append(1) or real(*args, **kw))
    _, out = prune(dense, tmp_path / "out", RESUME, calibration=own)
    assert weights_bytes(out) == weights_bytes(whole)
    assert len(written) == (damage is not None)


def test_a_finished_run_on_the_models_own_text_writes_none(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    own = {"source": "self", "nsamples": 4}
    report, out = prune(dense, tmp_path / "out", calibration=own)
    before = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(generate, "self_generated", lambda *_, **__: pytest.fail("text was written"))
        assert prune(dense, out, RESUME, calibration=own) == (report, out)
        with pytest.raises(InputError, match=r"other arguments \(config\.sparsity was 0\.5, now 0\.6\)"):
            prune(dense, out, RESUME, calibration=own, sparsity=0.6)
    assert tree(out) == before
    with pytest.raises(InputError, match=r"other arguments \(calibration\.nsamples was 4, now 5; calibration\.sha256"):
        prune(dense, out, RESUME, calibration={**own, "nsamples": 5})
    again, _ = prune(dense, out, {"resume": True, "overwrite": True}, calibration=own, sparsity=0.25)
    assert again.sparsity == 0.25


def test_two_outputs_after_a_crash_are_left_to_the_user(replacing, tmp_path, monkeypatch):
    dense, old = replacing
    with monkeypatch.context() as patch:
        crash_in_finish(patch, 1)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", {"overwrite": True})
    shutil.copytree(dense, tmp_path / "out")
    with pytest.raises(InputError, match=r"exists twice, also as .*old'"):
        prune(dense, tmp_path / "out", {"overwrite": True})
    assert weights_bytes(tmp_path / ".out.unfinished" / "old") == old


def test_an_output_that_appeared_meanwhile_stays(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    real = pipeline.prune_model

    def meanwhile(*arguments, **kw):
        shutil.copytree(dense, tmp_path / "out")
        return real(*arguments, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prune_model", meanwhile)
        with pytest.raises(InputError, match="exists; pass --overwrite"):
            prune(dense, tmp_path / "out")
    assert weights_bytes(tmp_path / "out") == weights_bytes(dense)
    with pytest.raises(InputError, match=r"did not write it .* move it, or"):
        prune(dense, tmp_path / "out", {"resume": True, "overwrite": True})
    shutil.rmtree(tmp_path / "out")
    _, out = prune(dense, tmp_path / "out", {"resume": True})
    assert weights_bytes(out) != weights_bytes(dense)


def test_the_old_output_is_there_until_the_new_one_is(replacing, tmp_path, monkeypatch):
    dense, old = replacing
    crash_after(monkeypatch, 2)
    with pytest.raises(Crash):
        prune(dense, tmp_path / "out", {"overwrite": True})
    assert weights_bytes(tmp_path / "out") == old


# The lock


def test_a_second_run_is_refused(stopped, tmp_path):
    lock = (tmp_path / ".out.unfinished" / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    for options in ({}, RESUME):
        with pytest.raises(InputError, match="is being written by another run; wait for it"):
            prune(stopped, tmp_path / "out", options)
    assert finished_blocks(tmp_path / ".out.unfinished") == 2
    lock.close()
    prune(stopped, tmp_path / "out", RESUME)


def test_a_lock_whose_folder_went_is_none(tmp_path, monkeypatch):
    """A run ends while another one waits at its lock: that one must not hold the lock of a folder that is gone."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(None)
        if len(calls) == 1:  # the other run removes its folder just now
            shutil.rmtree(tmp_path / ".out.unfinished")
        real(file, how)

    monkeypatch.setattr("ace_ext.runs.unfinished.fcntl.flock", flock)
    workspace = Workspace(tmp_path / "out", {})
    assert len(calls) == 2
    with pytest.raises(InputError, match="another run"):
        Workspace(tmp_path / "out", {})
    workspace.remove()
    assert list(tmp_path.iterdir()) == []


# Fingerprints


def test_differences_are_named():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": [3]}}) == ["a was 1, now null", "b.c was 2, now [3]"]


@pytest.mark.parametrize("place", [0, 2**20 + 1, 3 * 2**20, 5 * 2**20])
def test_a_changed_matrix_anywhere_is_seen(place, tmp_path):
    """Not only at the ends of the file: training may change some matrices and no others."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(6 * 2**20))
    before = fingerprint_of_files([path])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1" * 2**14)
    assert fingerprint_of_files([path]) != before


def test_another_number_of_threads_is_refused(stopped, tmp_path, threads):
    """Sums in float32 depend on it, so the rest would have bytes of neither run."""
    before = torch.get_num_threads()
    threads(before + 1)
    with pytest.raises(InputError, match=rf"threads was {before}, now {before + 1}"):
        prune(stopped, tmp_path / "out", RESUME)
    threads(before)
    prune(stopped, tmp_path / "out", RESUME)


def test_another_kind_of_processor_is_refused(stopped, tmp_path, monkeypatch):
    """Its vector instructions add in another order."""
    before = torch.backends.cpu.get_cpu_capability()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        with pytest.raises(InputError, match=rf'instructions was "{before}", now "DEFAULT"'):
            prune(stopped, tmp_path / "out", RESUME)
    prune(stopped, tmp_path / "out", RESUME)


# Bytes that change between two runs


def flip(path, place: int) -> None:
    """Changes one byte; a negative place counts from the end."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def place_of(folder, name: str) -> int:
    """Where a tensor of ``model.safetensors`` begins."""
    with (folder / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]


@pytest.mark.parametrize("offload", ["disk", "none"])
@pytest.mark.parametrize(
    ("file", "tensor", "named"),
    [
        ("model/model.safetensors", "model.layers.1.mlp.up_proj.weight", r"model\.layers\.1 in "),
        ("model/model.safetensors", "model.layers.0.input_layernorm.weight", r"model\.layers\.0 in "),
        ("model/model.safetensors", "model.embed_tokens.weight", r"model\.safetensors"),
        ("model/config.json", None, r"config\.json"),
        ("hidden-0-0.bin", None, r"hidden-0-0\.bin"),
        ("state.json", None, r"state\.json is damaged"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_changed_bytes_are_named(offload, file, tensor, named, stopped, tmp_path):
    unfinished = tmp_path / ".out.unfinished"
    flip(unfinished / file, 60 if tensor is None else place_of(unfinished / "model", tensor))
    with pytest.raises(InputError, match=rf"resume: .*{named}.*checksum differs.*start over without --resume"):
        prune(stopped, tmp_path / "out", {**RESUME, "offload": offload})
    assert not (tmp_path / "out").exists()
    prune(stopped, tmp_path / "out", {"offload": offload})


def test_what_was_not_finished_is_written_again(stopped, tmp_path):
    """The crash left the third block's weights in the file, counted by nothing: they may be anything."""
    model = tmp_path / ".out.unfinished" / "model"
    flip(model / "model.safetensors", place_of(model, "model.layers.2.mlp.up_proj.weight"))
    _, out = prune(stopped, tmp_path / "out", RESUME)
    _, whole = prune(stopped, tmp_path / "whole")
    assert weights_bytes(out) == weights_bytes(whole)


def test_changed_targets_of_training_are_named(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    config = {"method": "wanda + train(epochs=1)"}
    with monkeypatch.context() as patch:
        crash_after(patch, 1)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out", **config)
    flip(tmp_path / ".out.unfinished" / "dense-0-1.bin", 5)
    with pytest.raises(InputError, match=r"resume: .*dense-0-1\.bin has changed .*start over without --resume"):
        prune(dense, tmp_path / "out", RESUME, **config)
