"""Runs that hold one block at a time write the same bytes as runs in memory; impossible requests are errors."""

import json

import pytest
import torch
from folders import prune, save_dense, weights_bytes
from tiny_models import FAMILIES, make_model

from ace_ext import InputError
from ace_ext.models.block_store import OffloadedBlocks, entrance, load_, unload_
from ace_ext.models.blocks import find_blocks
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import skeleton
from ace_ext.process_memory import available_bytes, parse_bytes, resident_bytes
from ace_ext.runs import memory_model, pipeline
from ace_ext.runs.model_source import Demand

ON_TOKENS = {"source": "tokens"}
DISK, MEMORY = {"offload": "disk", "overwrite": True}, {"offload": "none", "overwrite": True}


# Shards are the harder case, so every family has them; how a single file is read does not depend on the family.
ONE_FILE, SHARDED = {}, {"max_shard_size": "20KB"}
TRIED = ("llama", "gemma3", "qwen3-moe")


@pytest.mark.parametrize(
    ("family", "save"),
    [
        pytest.param(family, SHARDED, id=f"sharded-{family}", marks=[] if family in TRIED else [pytest.mark.nightly])
        for family in FAMILIES
    ]
    + [pytest.param("mixtral", ONE_FILE, id="one-file-mixtral")],
)
def test_same_bytes_as_in_memory(family, save, tmp_path):
    dense = save_dense(tmp_path / "dense", family, **save)
    assert (len(weights_bytes(dense)) > 1) == bool(save)
    seen = set()
    for config in (
        {"method": "collect(order=block) + wanda"},
        {"method": "collect(order=sequential) + wanda"},
        {"method": "collect(order=sequential, batch_tokens=32) + wanda"},
        {"method": "collect(order=block, batch_tokens=32) + cosp", "pattern": "2:4"},
    ):
        _, memory = prune(dense, tmp_path / "memory", MEMORY, ON_TOKENS, **config)
        _, disk = prune(dense, tmp_path / "disk", DISK, ON_TOKENS, **config)
        assert weights_bytes(disk) == weights_bytes(memory) != weights_bytes(dense), config
        assert sorted(f.name for f in disk.iterdir()) == sorted(f.name for f in memory.iterdir())
        seen.add(b"".join(weights_bytes(disk).values()))
    assert len(seen) >= 3  # the configurations do not all do the same


@pytest.mark.parametrize("order", ["block", "sequential"])
@pytest.mark.parametrize("offload", ["disk", "none"])
@pytest.mark.parametrize("batch_tokens", [32, 16384])
def test_hidden_states_in_files_change_nothing(order, offload, batch_tokens, tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    config = {"method": f"collect(order={order}, batch_tokens={batch_tokens}) + wanda"}
    _, kept = prune(dense, tmp_path / "kept", {"offload": offload}, **config)
    monkeypatch.setattr(Demand, "hidden_fits", lambda _: False)
    _, in_files = prune(dense, tmp_path / "files", {"offload": offload}, **config)
    assert weights_bytes(in_files) == weights_bytes(kept)


def test_the_skeleton_holds_no_weight_and_blocks_come_and_go(tmp_path):
    dense = save_dense(tmp_path / "dense", "llama-tied")
    shards = Shards(dense)
    model = skeleton(dense, shards)
    blocks = find_blocks(model, check=False)
    expected = make_model("llama-tied", torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    load_(blocks[1].module, blocks[1].name, shards, "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.is_meta != name.startswith("model.layers.1.")
        assert parameter.is_meta or torch.equal(parameter, expected.get_parameter(name))
    unload_(blocks[1].module)
    with entrance(model, blocks, shards, "cpu"):
        assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)
        assert all(p.is_meta for block in blocks for p in block.module.parameters())
    assert all(p.is_meta for p in model.parameters())


def test_a_block_of_another_shape_is_refused(tmp_path):
    dense = save_dense(tmp_path / "dense")
    shards = Shards(dense)
    blocks = find_blocks(skeleton(dense, shards), check=False)
    blocks[0].module.mlp.up_proj.weight = torch.nn.Parameter(torch.empty(1, 1, device="meta"))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj\.weight must be \[1, 1\] by the configuration"):
        load_(blocks[0].module, blocks[0].name, shards, "cpu")


def test_a_bad_weight_is_found_when_its_block_is_read(tmp_path):
    model = make_model("llama", torch.bfloat16)
    dense = save_dense(tmp_path / "dense")
    model.model.layers[1].mlp.up_proj.weight.data[1, 2] = float("inf")
    model.save_pretrained(dense)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight must be finite \(got inf at index \[1, 2\]"):
        prune(dense, tmp_path / "out", DISK)
    assert not (tmp_path / "out").exists()


def as_bin(folder):
    torch.save(make_model("llama", torch.bfloat16).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_gptq(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "calibration", "config", "message"),
    [
        (as_bin, {}, {}, "offload disk needs a folder or hub model of safetensors"),
        (as_gptq, {}, {}, "holds gptq weights; give the unquantized checkpoint"),
        (None, {"dtype": "float32"}, {}, "unchanged in dtype float32, and .* has none; save it with save_pretrained"),
        (None, {"source": "self"}, {}, "calibration self needs the whole model in memory"),
        (None, {}, {"group": "model"}, "group model compares all; use group row or matrix"),
    ],
)
def test_what_cannot_be_offloaded_is_said(change, calibration, config, message, tmp_path):
    dense = save_dense(tmp_path / "dense")
    if change:
        change(dense)
    with pytest.raises(InputError, match=message):
        prune(dense, tmp_path / "out", {"offload": "disk"}, calibration, **config)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dense", "text.txt"]


@pytest.mark.parametrize("change", [as_bin, None], ids=["bin", "other-dtype"])
def test_other_checkpoints_run_in_memory_under_a_budget(change, tmp_path):
    """Models that are not in safetensors of the output dtype: their size is that of the loaded parameters."""
    dense = save_dense(tmp_path / "dense")
    if change:
        change(dense)
    budget = {"max_memory": resident_bytes() + 2**30}
    _, out = prune(dense, tmp_path / "out", budget, {"dtype": "float32" if change is None else "auto"})
    assert weights_bytes(out)
    with pytest.raises(InputError, match=r"max-memory must be at least \d+MB here"):
        prune(dense, tmp_path / "none", {"max_memory": 10**6}, {"dtype": "float32" if change is None else "auto"})


class Free:
    """A machine whose process takes nothing, so that the tiny model's bytes decide."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(memory_model, "process_bytes", lambda *_, **__: 0)
        self.contexts = []
        kept = pipeline.RunContext
        monkeypatch.setattr(pipeline, "RunContext", lambda **kw: self.contexts.append(kw) or kept(**kw))

    def last(self):
        blocks, journal = self.contexts[-1]["blocks"], self.contexts[-1]["journal"]
        return isinstance(blocks, OffloadedBlocks), journal.resident_hidden


def least_of(error) -> int:
    """The size that the error message names; it must then be enough."""
    return parse_bytes(str(error.value).split("at least ")[1].split(" ")[0])


def test_auto_offloads_what_does_not_fit_and_names_the_least(tmp_path, monkeypatch):
    """A model of 42 MB whose blocks take 7: a budget for all, for one, and for none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=4
    )
    dense = save_dense(tmp_path / "dense")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(dense)
    free = Free(monkeypatch)
    small = {"nsamples": 2, "seqlen": 16}
    outputs = []
    for budget, offloads in ((10**9, False), (20 * 10**6, True)):
        _, out = prune(dense, tmp_path / str(budget), {"max_memory": budget}, small)
        assert free.last() == (offloads, True)
        outputs.append(weights_bytes(out))
    assert outputs[0] == outputs[1]
    for offload, hint in (("disk", "lower batch_tokens of collect$"), ("none", "or pass --offload disk")):
        with pytest.raises(InputError, match=f"max-memory must be at least .* here .got 2MB.*{hint}") as error:
            prune(dense, tmp_path / "none", {"max_memory": 2 * 10**6, "offload": offload}, small)
        assert (least_of(error) > 40 * 10**6) == (offload == "none")
        prune(dense, tmp_path / offload, {"max_memory": least_of(error), "offload": offload}, small)


def test_hidden_states_leave_memory_when_they_do_not_fit(tmp_path, monkeypatch):
    dense = save_dense(tmp_path / "dense")
    free = Free(monkeypatch)
    many = {"nsamples": 2000, "seqlen": 64}  # hidden states of 8 MB
    _, kept = prune(dense, tmp_path / "kept", {"offload": "disk"}, many, method="collect(batch_tokens=4096) + wanda")
    assert free.last() == (True, True)
    with pytest.raises(InputError) as error:
        prune(
            dense,
            tmp_path / "none",
            {"offload": "disk", "max_memory": 1},
            many,
            method="collect(batch_tokens=4096) + wanda",
        )
    budget = {"offload": "disk", "max_memory": least_of(error)}
    _, out = prune(dense, tmp_path / "files", budget, many, method="collect(batch_tokens=4096) + wanda")
    assert free.last() == (True, False)
    assert weights_bytes(out) == weights_bytes(kept)


def test_skip_may_name_the_whole_first_block(tmp_path):
    dense = save_dense(tmp_path / "dense")
    outputs = {}
    for offload in ("disk", "none"):
        report, out = prune(dense, tmp_path / offload, {"offload": offload}, skip=(r"layers\.0\.",))
        assert [len(block.matrices) for block in report.blocks] == [0, 7, 7]
        outputs[offload] = weights_bytes(out)
    assert outputs["disk"] == outputs["none"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), (" 800 mb", 8 * 10**8), ("1048576", 2**20)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 XB", "0", "1e9", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="max-memory must be a size like 2GB"):
        parse_bytes(text)


def test_memory_counts():
    assert 10**7 < resident_bytes() < 10**11
    assert 0 < available_bytes() < 2**62
