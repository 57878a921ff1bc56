"""Saved statistics: pruning from the file equals the run that saved it; it serves all sparsities and metrics."""

import contextlib
import json
import re
import zipfile

import pytest
import torch
from folders import command, prune, save_dense, weights_bytes
from helpers import rest_nightly
from tiny_models import make_model

from ace_ext import InputError, PruneConfig
from ace_ext.cli.main import main
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning.metrics import METRICS
from ace_ext.runs import statistics_file
from ace_ext.runs.memory_model import estimate
from ace_ext.runs.own_files import stored_sizes
from ace_ext.runs.workspace import Workspace


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense")


def keep(dense, name="stats.zip", run=None, **config):
    """A run that saves its statistics: ``(their file, its output folder)``."""
    file = dense.parent / name
    _, out = prune(dense, dense.parent / f"{name}.out", {"save_stats": file, **(run or {})}, **config)
    return file, out


def from_file(dense, file, name="from-file", run=None, **config):
    return prune(dense, dense.parent / name, {"stats": file, **(run or {})}, **config)[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch_tokens", rest_nightly([32], [32, 16384]))
def test_from_the_file_as_from_the_run(metric, batch_tokens, dense):
    file, out = keep(dense, method=f"collect(batch_tokens={batch_tokens}) + {metric}")
    again = from_file(dense, file, method=metric)
    assert weights_bytes(again) == weights_bytes(out) != weights_bytes(dense)


@pytest.mark.parametrize("gram", ["plain", "cosine", "sketch"])
def test_a_solvers_statistics_are_kept(gram, dense):
    file, out = keep(dense, method=f"admm(gram={gram})")
    assert weights_bytes(from_file(dense, file, method=f"admm(gram={gram})")) == weights_bytes(out)


def test_statistics_serve_a_method_that_quantizes(dense):
    """Also the whole Gram matrix that a stage with gram=sketch then reads."""
    file, out = keep(dense, method="fast + quantize")
    assert weights_bytes(from_file(dense, file, method="fast + quantize")) == weights_bytes(out)
    again = from_file(dense, file, "again", method="fast + quantize(bits=8, gram=cosine)")
    assert weights_bytes(out) != weights_bytes(again) != weights_bytes(dense)
    with pytest.raises(InputError, match="holds cosine-gram, input, weighted of statistics, not rounding-gram"):
        from_file(dense, file, "alone", method="quantize(bits=8, gram=cosine)")
    with pytest.raises(InputError, match="holds cosine-gram, input, weighted of statistics, not shared-gram"):
        from_file(dense, file, "shared", method="fast + quantize(bits=8)")


def test_statistics_of_a_run_with_8_bits_serve_one_without(dense):
    file, _ = keep(dense, method="balanced + quantize(bits=8)")
    from_file(dense, file, method="balanced")


def test_statistics_of_a_run_that_only_quantizes(dense):
    file, out = keep(dense, method="quantize")
    assert weights_bytes(from_file(dense, file, method="quantize")) == weights_bytes(out)
    again = from_file(dense, file, "again", method="magnitude + quantize(bits=8, gram=cosine)")
    assert weights_bytes(out) != weights_bytes(again) != weights_bytes(dense)


@pytest.mark.parametrize(
    "other",
    [
        {"sparsity": 0.7},
        {"pattern": "2:4"},
        {"group": "matrix", "sparsity": 0.3},
        {"group": "model"},
        {"method": "wanda"},
        {"method": "cosvar", "sparsity": 0.25},
        {"method": "stade", "pattern": "4:8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", rest_nightly([{}], [{}, {"method": "wanda", "sparsity": 0.9}]), ids=str)
def test_one_file_for_other_settings(kept, other, dense):
    """A file saved by a run with other settings gives the same bytes as a new run that saves its own."""
    file, _ = keep(dense, **kept)
    _, fresh = keep(dense, "fresh.zip", **other)
    assert weights_bytes(from_file(dense, file, **other)) == weights_bytes(fresh)


def test_the_inputs_are_the_dense_models(dense):
    """In a run of order block that saves no statistics, blocks read the output of pruned blocks, so only the first
    block agrees. File and report say which model the statistics describe."""
    file, out = keep(dense)
    report, plain = prune(dense, dense.parent / "plain", method="collect(order=block) + wanda")
    kept, other = (stored(folder) for folder in (out, plain))
    assert all(torch.equal(kept[n], other[n]) for n in kept if n.startswith("model.layers.0."))
    assert not all(torch.equal(kept[n], other[n]) for n in kept)
    assert description(file)["inputs"] == "dense model"
    assert report.extra["statistics"] == "of the run"
    assert (
        json.loads((out / "ace_report.json").read_text())["extra"]["statistics"] == "of the dense model, kept in a file"
    )


def stored(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def description(file) -> dict:
    return json.loads(zipfile.ZipFile(file).read("statistics.json"))


def test_nothing_runs_forward(dense, monkeypatch):
    file, _ = keep(dense)
    monkeypatch.setattr("ace_ext.engine.batch_states.run_call", None)
    monkeypatch.setattr("ace_ext.engine.collection.run_call", None)
    monkeypatch.setattr("ace_ext.engine.api.capture_calls", None)
    (dense.parent / "text.txt").unlink()  # no text is read either
    from_file(dense, file)


@pytest.mark.parametrize("run", [{"offload": "disk"}, {"offload": "none"}], ids=str)
def test_with_and_without_offload(run, dense):
    file, out = keep(dense, run={"offload": "disk"})
    other, _ = keep(dense, "other.zip", run={"offload": "none"})
    assert weights_bytes(from_file(dense, file, "one", run, sparsity=0.6)) == weights_bytes(
        from_file(dense, other, "two", run, sparsity=0.6)
    )
    assert weights_bytes(from_file(dense, other, "three", run)) == weights_bytes(out)


def test_most_metrics_read_what_every_file_holds(dense):
    file, _ = keep(dense, method="magnitude")
    assert description(file)["kinds"] == ["input", "weighted"]
    for metric, row in METRICS.items():
        if "moment" not in row.needs:
            from_file(dense, file, metric, method=metric)
        else:
            with pytest.raises(
                InputError, match=r"holds input, weighted of statistics, not moment; collect again with"
            ):
                from_file(dense, file, metric, method=metric)
    with_moment, _ = keep(dense, "moment.zip", method="cosp")
    assert description(with_moment)["kinds"] == ["input", "moment", "weighted"]
    from_file(dense, with_moment, "moment", method="cosp-exact")


def test_kept_by_a_run_that_was_resumed(dense, monkeypatch):
    file, out = keep(dense)
    real, done = Workspace._write_state, []

    def write(self, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(None)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "_write_state", write)
        with pytest.raises(KeyboardInterrupt):
            keep(dense, "resumed.zip")
    with pytest.raises(InputError, match='statistics was "of the dense model, kept in a file", now "of the run"'):
        prune(dense, dense.parent / "resumed.zip.out", {"resume": True}, method="collect(order=block) + wanda")
    resumed, again = keep(dense, "resumed.zip", {"resume": True})
    assert weights_bytes(again) == weights_bytes(out)
    assert resumed.read_bytes() != b""
    assert blobs(resumed) == blobs(file)


@pytest.mark.parametrize("blocks", [1, 3])
def test_another_file_of_the_same_model_and_text_is_another_run(blocks, dense, monkeypatch):
    """Sums of other batches: the rest of the blocks would be pruned from other statistics than the first."""
    file, _ = keep(dense, method="admm")
    other, _ = keep(dense, "other.zip", method="collect(batch_tokens=16) + admm")
    assert blobs(file) != blobs(other)
    real, done = Workspace._write_state, []

    def write(self, *arguments):
        if len(done) == blocks:
            raise KeyboardInterrupt
        done.append(None)
        return real(self, *arguments)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Workspace, "_write_state", write)
        from_file(dense, file, method="admm")
    assert (dense.parent / "from-file").exists() == (blocks == 3)
    with pytest.raises(InputError, match=r'stats was "[0-9a-f]+.*, now "[0-9a-f]+'):
        from_file(dense, other, run={"resume": True}, method="admm")
    copied = file.rename(dense.parent / "copied.zip")
    again = from_file(dense, copied, run={"resume": True}, method="admm")
    assert weights_bytes(again) == weights_bytes(from_file(dense, copied, "whole", method="admm"))


def test_a_finished_run_has_its_statistics(dense):
    """A resumed one says that it is complete only if the file is there that it was to save."""
    file, out = keep(dense)
    run = {"save_stats": file, "resume": True}
    prune(dense, out, run)
    moved = file.rename(dense.parent / "moved.zip")
    with pytest.raises(InputError, match=r"is complete, but save-stats '.*stats\.zip' is not there; start over with"):
        prune(dense, out, run)
    prune(dense, out, {**run, "save_stats": moved})
    prune(dense, out, {"save_stats": file, "overwrite": True})
    assert blobs(file) == blobs(moved)
    assert file.read_bytes() == moved.read_bytes()  # no time of day is in it


def blobs(file) -> dict[str, bytes]:
    archive = zipfile.ZipFile(file)
    assert archive.testzip() is None
    return {name: archive.read(name) for name in archive.namelist()}


# What is refused


def test_order_and_place_are_checked_first(dense, tmp_path):
    sequential = {"method": "collect(order=sequential) + wanda"}
    for run, config, message in [
        ({"save_stats": tmp_path / "s"}, sequential, "statistics are of dense blocks; leave out order=sequential"),
        ({"stats": tmp_path / "s"}, sequential, "statistics are of dense blocks; leave out order=sequential"),
        ({"stats": tmp_path / "s", "save_stats": tmp_path / "t"}, {}, "not both"),
        ({"save_stats": tmp_path / "none" / "s"}, {}, "must be a file in a folder that exists"),
        ({"save_stats": tmp_path}, {}, r"save-stats must be a file .*, a folder"),
        ({"stats": tmp_path / "s"}, {}, "is not a file of --save-stats: .*No such file"),
    ]:
        with pytest.raises(InputError, match=message):
            prune(dense, tmp_path / "out", run, **config)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_another_model(dense):
    file, _ = keep(dense)
    make_model("llama", torch.bfloat16, seed=1).save_pretrained(dense)
    with pytest.raises(InputError, match=r"belongs to another model: files\.model\.safetensors was"):
        from_file(dense, file)


def test_another_skip(dense):
    file, _ = keep(dense, skip=("down_proj",))
    with pytest.raises(
        InputError, match=r"has no statistics of model\.layers\.0\.mlp\.down_proj; collect again with the same skip"
    ):
        from_file(dense, file)
    from_file(dense, file, "less", skip=("down_proj", "up_proj"))


def rewrite(file, **changed) -> None:
    """The archive with some members' bytes replaced; None leaves one out."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changed
    with zipfile.ZipFile(file, "w") as archive:
        for name, blob in members.items():
            if blob is not None:
                archive.writestr(name, blob)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "is not a file of --save-stats"),
        (lambda f: f.write_text("statistics"), "is not a file of --save-stats"),
        (lambda f: rewrite(f, **{"statistics.json": b"[]"}), "is not a file of --save-stats"),
        (lambda f: rewrite(f, **{"statistics.json": b"\xff"}), "is not a file of --save-stats"),
        (lambda f: rewrite(f, **{"statistics.json": None}), "is not a file of --save-stats"),
        (
            lambda f: rewrite(f, **{"statistics.json": json.dumps({**description(f), "format": 7})}),
            "format is 7, not 1",
        ),
        (lambda f: rewrite(f, **{"model.layers.1": b"short"}), r"is damaged at model\.layers\.1"),
        (lambda f: rewrite(f, **{"model.layers.1": None}), r"has no statistics of model\.layers\.1\.self_attn"),
        (lambda f: flip_a_bit(f), r"is damaged at model\.layers\.2: Bad CRC"),
        (lambda f: encrypt(f), r"is not a file of --save-stats.*encrypted"),
        (lambda f: compress(f), r"is not a file of --save-stats: statistics\.json is compressed"),
        (lambda f: change_tokens(f), r"is damaged at model\.layers\.1: its checksum differs; collect again"),
    ],
)
def test_damaged_files(damage, message, dense):
    file, _ = keep(dense)
    damage(file)
    with pytest.raises(InputError, match=message):
        from_file(dense, file)
    assert not (dense.parent / "from-file").exists()


def flip_a_bit(file) -> None:
    blob = zipfile.ZipFile(file).read("model.layers.2")
    whole = bytearray(file.read_bytes())
    whole[whole.index(blob) + len(blob) - 1] ^= 1
    file.write_bytes(whole)


def encrypt(file) -> None:
    """Says of each member that it is encrypted."""
    whole = bytearray(file.read_bytes())
    for head, flag in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = whole.find(head)
        while at >= 0:
            whole[at + flag] |= 1
            at = whole.find(head, at + 1)
    file.write_bytes(whole)


def compress(file) -> None:
    """Packs it as other programs would; a member could then unpack to any size."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, blob in members.items():
            archive.writestr(name, blob)


def change_tokens(file) -> None:
    """Writes the archive again with another number of tokens, so that zip's own checksums are right."""
    blob = zipfile.ZipFile(file).read("model.layers.1")
    changed = blob.replace(b'tokens\\": 128', b'tokens\\": 129', 1)
    assert changed != blob
    rewrite(file, **{"model.layers.1": changed})


def test_a_changed_blob_of_a_stopped_run_is_named(dense, monkeypatch):
    real = Workspace._write_state

    def write(self, values):
        if values["finished"] == 3:
            raise KeyboardInterrupt
        return real(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "_write_state", write)
        with pytest.raises(KeyboardInterrupt):
            keep(dense, "stopped.zip")
    blob = dense.parent / ".stopped.zip.out.unfinished" / "stats" / "model.layers.0"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(InputError, match=r"resume: .*stats/model\.layers\.0 is damaged \(its checksum differs\)"):
        keep(dense, "stopped.zip", {"resume": True})


def test_linears_of_one_input_share_it_in_the_file(dense):
    """As in memory: q, k and v read the same tensor, and so do gate and up."""
    file, _ = keep(dense, method="wanda")
    stats = statistics_file.SavedStatistics(file, description(file)["model"], frozenset()).block(
        "model.layers.0", (), "cpu"
    )
    assert stats["self_attn.q_proj"].input is stats["self_attn.v_proj"].input
    assert stats["mlp.gate_proj"].input is stats["mlp.up_proj"].input
    assert stats["self_attn.q_proj"].input is not stats["self_attn.o_proj"].input
    assert stats["self_attn.q_proj"].weighted is not stats["self_attn.v_proj"].weighted


def test_memory_is_planned_from_the_files_sizes(dense):
    """A block's statistics, which Linears share, twice while they are read; no activations and no hidden states."""
    file, _ = keep(dense, method="admm")
    saved = statistics_file.SavedStatistics(file, description(file)["model"], frozenset())
    read = []
    for index in range(3):
        parts = [part for stats in saved.block(f"model.layers.{index}", (), "cpu").values() for part in all_of(stats)]
        read.append(sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in parts}.values()))
    model = make_model("llama", torch.bfloat16)

    def planned(stored, **config):
        config = PruneConfig(**config).on_dense_blocks()
        return estimate(model, find_blocks(model), None, config, 128, 128, offload=False, process=0, stored=stored)

    found = planned(stored_sizes(file), method="admm")
    assert max(read) <= found.statistics <= 1.2 * max(read)  # the file has headers too
    assert found.hidden == 0
    assert found.total - found.model < 0.5 * (planned(None, method="admm").total - found.model)
    whole = planned(stored_sizes(file), method="wanda", group="model")
    assert sum(read) <= whole.statistics <= 1.2 * sum(read)
    assert whole.forward == max(stored_sizes(file))


def all_of(stats):
    for part in stats.parts().values():
        yield from part if isinstance(part, list) else [part] if torch.is_tensor(part) else part.tensors().values()


def test_sizes_of_a_file_of_another_kind(tmp_path):
    assert stored_sizes(tmp_path / "none.zip") == []
    (tmp_path / "text.zip").write_text("text")
    assert stored_sizes(tmp_path / "text.zip") == []


def test_it_is_said_what_a_file_serves(dense, capsys):
    file = dense.parent / "stats.zip"
    assert main(command(dense, dense.parent / "out", "--method", "obs", "--save-stats", file)[3:]) == 0
    served = statistics_file.reusable(frozenset(description(file)["kinds"]))
    assert f"ace-prune: statistics written to {file}: {served}" in capsys.readouterr().err
    for number, method in enumerate(("wanda", "varp", "admm", "obs", "swaps", "mean-swaps", "mean-update")):
        assert re.search(rf"\b{method}(,|$)", served)
        from_file(dense, file, f"of-{number}", method=method, pattern="2:4")
    for method in ("cosp", "admm(gram=sketch)", "swaps(gram=cosine)"):
        assert method not in served
        with pytest.raises(InputError, match="collect again with --save-stats and this method"):
            from_file(dense, file, "refused", method=method)
