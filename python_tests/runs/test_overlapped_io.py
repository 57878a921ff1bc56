"""Reading the next block and writing the last one while a block is pruned: the same bytes, and the same safety."""

import json
import threading

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from tiny_models import make_model

from ace_ext import InputError
from ace_ext.models.block_store import OffloadedBlocks, load_
from ace_ext.models.blocks import find_blocks
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import skeleton
from ace_ext.records import BlockReport
from ace_ext.runs import workspace
from ace_ext.runs.model_source import Demand, MemoryChoice
from ace_ext.runs.workspace import Workspace


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_block_as_it_is_outlives_its_weights(family):
    """What a writer sees stays the same when the module's parameters are dropped and read anew."""
    block = find_blocks(make_model(family))[1]
    before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
    kept = block.as_it_is()
    for module in block.module.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
    for fused in block.experts:
        fused.bind()
    assert {name: p.shape for name, p in kept.module.named_parameters()} == {n: t.shape for n, t in before.items()}
    for name, parameter in kept.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert kept.linears.keys() == block.linears.keys()
    for fused in kept.experts:
        for expert, (child, linear) in enumerate(fused.linears.items()):
            assert kept.linears[child] is linear
            assert torch.equal(linear.weight, fused.tensor[expert])


@pytest.fixture
def laid_out(tmp_path):
    folder = save_dense(tmp_path / "dense", dtype=torch.float32)
    shards = Shards(folder)
    return shards, find_blocks(skeleton(folder, shards, "auto"), check=False)


def test_blocks_read_ahead_are_those_of_the_files(laid_out, monkeypatch):
    """In order, and after a jump."""
    shards, blocks = laid_out
    threads, real = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda *a: (threads.append(threading.current_thread().name), real(*a))[1])
    store = OffloadedBlocks(blocks, shards, "cpu")
    store.read_ahead()
    for index in (0, 0, 1, 2, 0, 2):
        with store.loaded(index) as block:
            for name, parameter in block.module.named_parameters():
                assert torch.equal(parameter, real(shards, f"{block.name}.{name}")), name
        assert all(parameter.is_meta for parameter in block.module.parameters())
    assert any(name.startswith("read-ahead") for name in threads)


def test_blocks_of_other_files_are_read_ahead_from_those(laid_out, tmp_path):
    """As in healing, where trained blocks are in the output and all others in the pruned folder."""
    shards, blocks = laid_out
    others, changed = (
        Shards(save_dense(tmp_path / "other", dtype=torch.float32)),
        f"{blocks[1].name}.mlp.up_proj.weight",
    )
    others.write({changed: others.read(changed) + 1})

    class Mixed(OffloadedBlocks):
        def shards_of(self, block):
            return others if block is blocks[1] else shards

    store = Mixed(blocks, shards, "cpu")
    store.read_ahead()
    for index in range(3):
        with store.loaded(index) as block:
            for name, parameter in block.module.named_parameters():
                expected = (others if index == 1 else shards).read(f"{block.name}.{name}")
                assert torch.equal(parameter, expected), (index, name)
    assert not torch.equal(others.read(changed), shards.read(changed))


def test_an_error_in_reading_ahead_is_raised_when_the_block_is_needed(laid_out):
    shards, blocks = laid_out
    store = OffloadedBlocks(blocks, shards, "cpu")
    store.read_ahead()
    del shards.entries[f"{blocks[1].name}.mlp.up_proj.weight"]
    with store.loaded(0):
        pass
    with pytest.raises(InputError, match="has no tensor"), store.loaded(1):
        pass
    load_(blocks[0].module, blocks[0].name, shards, "cpu")


@pytest.mark.parametrize("batch_tokens", [32, 16384], ids=["several", "one"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_the_bytes_are_the_same(offload, batch_tokens, tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    outputs = []
    for overlap in (True, False):
        choice = MemoryChoice(overlap=overlap, forwards=overlap)
        monkeypatch.setattr(Demand, "decide", lambda _, choice=choice: choice)
        _, output = prune(
            dense, tmp_path / str(overlap), {"offload": offload}, method=f"collect(batch_tokens={batch_tokens}) + wanda"
        )
        outputs.append(weights_bytes(output))
    assert outputs[0] == outputs[1] != weights_bytes(dense)


class Slow:
    """A writer of blocks that waits until it may go on."""

    def __init__(self) -> None:
        self.go, self.names = threading.Event(), []

    def write(self, block) -> None:
        assert self.go.wait(30)
        self.names.append(block.name)

    def written(self, block) -> str:
        return f"checksum of {block.name}"


def finished(folder) -> int:
    path = folder / ".out.unfinished" / "state.json"
    return json.loads(path.read_text())["finished"] if path.exists() else 0


@pytest.fixture
def journal(tmp_path):
    journal = Workspace(tmp_path / "out", {})
    journal.writer = Slow()
    yield journal
    journal.writer.go.set()
    journal.remove()


def test_a_block_counts_as_done_once_it_is_on_the_disk(journal, tmp_path):
    first, second, *_ = find_blocks(make_model("llama"))
    states = HiddenStates([torch.zeros(1, 2, 3)], journal.folder)
    journal.block_done(first, BlockReport(first.name, 0.0), {}, [states.commit_later()])
    assert finished(tmp_path) == journal.finished == 0
    journal.writer.go.set()
    journal.settle()
    assert finished(tmp_path) == journal.finished == 1
    states.put(0, torch.ones(1, 2, 3))
    journal.block_done(second, BlockReport(second.name, 0.0), {}, [states.commit_later()])
    journal.stop_writing()
    assert journal.writer.names == [first.name, second.name]
    assert finished(tmp_path) == 2
    state = json.loads((journal.folder / "state.json").read_text())
    assert state["sums"]["blocks"] == {block.name: f"checksum of {block.name}" for block in (first, second)}
    assert (journal.folder / f"hidden-{state['side']}.bin").read_bytes()[:-32] == torch.ones(6).numpy().tobytes()


def test_an_error_in_writing_comes_with_the_next_block(journal, tmp_path):
    block = find_blocks(make_model("llama"))[0]

    def broken(_):
        raise OSError(28, "No space left on device")

    journal.writer.write = broken
    journal.block_done(block, BlockReport(block.name, 0.0), {}, [])
    with pytest.raises(OSError, match="No space left"):
        journal.settle()
    journal.settle()  # once
    assert finished(tmp_path) == journal.finished == 0


def test_hidden_states_are_written_when_the_work_is_worth_it(journal, monkeypatch, tmp_path):
    """Where they take long, only after four times as long; a run resumed there prunes the later blocks again."""
    now = [100.0]
    monkeypatch.setattr(workspace.time, "monotonic", lambda: now[0])
    journal.writer.go.set()
    journal._since = now[0]
    block = find_blocks(make_model("llama"))[0]

    def slowly():
        now[0] += 2.0

    records = []
    for _ in range(8):
        now[0] += 3.0
        wanted = journal.wants_states()
        journal.block_done(block, BlockReport(block.name, 0.0), {}, [slowly] if wanted else None)
        journal.settle()
        records.append(finished(tmp_path))
    assert records == [1, 1, 1, 4, 4, 4, 7, 7]
    journal.resident_hidden = False
    assert journal.wants_states(), "states in files are written anyway"


def test_a_run_resumes_from_the_last_hidden_states(tmp_path, monkeypatch):
    """The second block's were not written, so a run that stops in the third starts with the second."""
    dense = save_dense(tmp_path / "dense")
    calls = []

    def only_the_first(self):
        calls.append(None)
        return len(calls) == 1

    class Crash(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "wants_states", only_the_first)
        real = Workspace.block_done

        def block_done(self, *arguments):
            if len(self.blocks) == 2:
                raise Crash
            real(self, *arguments)

        patch.setattr(Workspace, "block_done", block_done)
        with pytest.raises(Crash):
            prune(dense, tmp_path / "out")
    assert finished(tmp_path) == 1
    _, output = prune(dense, tmp_path / "out", {"resume": True})
    _, whole = prune(dense, tmp_path / "whole")
    assert weights_bytes(output) == weights_bytes(whole)
