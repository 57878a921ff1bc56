"""Models that are not a simple chain of blocks: looped ones, Linears called twice, blocks that share states."""

import re
from collections import UserDict

import every_class
import other_classes
import pytest
import torch
from folders import TEXT, prune, weights_bytes
from helpers import rest_nightly
from tiny_models import make_model, make_tokenizer, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.dense_weights import NOT_CALLED
from ace_ext.engine.recorder import Recorder
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.handed_on import Equality, compare_arguments
from ace_ext.models.trial import try_walk
from ace_ext.pruning.statistics import StatisticsCollector
from ace_ext.records import PruneReport
from ace_ext.runs.verify import verify

READ_MORE = "its blocks read more than the output of the one before"
SHARED_KV = "gemma4_text"
SHARING, TWO_LISTS, TWICE, UNUSED = "gemma3n_text", "xlm", "prophetnet", "bart"
LOOPED = next(kind for kind in ("dory", "hrm_text") if kind in every_class.model_types())
"""The oldest transformers has only the second."""


def tried(model):
    return try_walk(model.eval(), ResidentBlocks(find_blocks(model)), {"input_ids": make_tokens()})


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "deepseek-v3"])
def test_a_chain_of_blocks_is_one(family):
    model = make_model(family)
    found = tried(model)
    assert found.reason is None
    assert list(found.uses) == [block.name for block in find_blocks(model)]
    for block in find_blocks(model):
        assert not found.uncalled(block)
        assert set(found.uses[block.name].values()) == {1}


@pytest.mark.parametrize(("kind", "reason"), [(LOOPED, r"calls \S+ \d+ times"), (TWO_LISTS, "another order")])
def test_what_is_no_chain_is_seen_before_anything_changes(kind, reason):
    model = every_class.build(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for stages, named in (("train", "train"), ("distill", "distill"), ("train + distill", "train and distill")):
        with pytest.raises(InputError, match=f"block by block: .*{reason}.*; leave out {named}$"):
            prune_model(model, make_tokens(), PruneConfig(f"wanda + {stages}", max_dense=0.5))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "beside", "reason"),
    [
        ("zaya", {}, READ_MORE),  # the state of a router
        ("zaya", {"num_hidden_layers": 3, "layer_types": ["hybrid"] * 3}, READ_MORE),
        ("glm_moe_dsa", {"index_topk": 8}, READ_MORE),  # the tokens that attention reads, fewer than the sample has
        ("glm_moe_dsa", {"index_topk": 16}, None),  # all of the sample's
    ],
)
def test_what_blocks_hand_on_depends_on_the_blocks(kind, beside, reason, monkeypatch):
    monkeypatch.setitem(every_class.BESIDE, kind, beside)
    assert tried(every_class.build(kind)).reason == reason


@pytest.mark.parametrize("kind", ["conditional_detr", "dab-detr", "pegasus_x", "yolos"])
def test_states_and_arguments_that_change_between_blocks_are_seen(kind):
    """Positions that are added to the states, and arguments that are computed from them."""
    model = other_classes.build(kind)
    found = try_walk(model, ResidentBlocks(find_blocks(model)), other_classes.inputs_of(model))
    assert re.fullmatch(r"its blocks from \S+ on read more than the output of the one before", found.reason)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((torch.ones(2), {"a": [torch.ones(3), 1]}), (torch.ones(2), {"a": [torch.ones(3), 2]}), Equality.YES),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, Equality.NO),
        ({"a": torch.ones(2)}, {"a": None}, Equality.NO),
        ({"a": torch.ones(2)}, {}, Equality.YES),  # a dict that blocks put values into
        (torch.tensor([[2, 1, 0]]), torch.tensor([[0, 2, 1]]), Equality.REORDERED),
        (torch.tensor([[2, 1, 0]]), torch.tensor([[0, 3, 1]]), Equality.NO),
        (torch.tensor([True, False]), torch.tensor([False, True]), Equality.NO),
        ((torch.tensor([0, 1]), torch.ones(1)), (torch.tensor([1, 0]), torch.zeros(1)), Equality.NO),
        (UserDict(a=torch.ones(2)), UserDict(a=torch.zeros(2)), Equality.NO),
    ],
)
def test_arguments_are_compared(one, other, expected):
    assert compare_arguments(one, other) == expected


def test_blocks_are_pruned_in_the_order_of_their_calls():
    model = every_class.build(TWO_LISTS)
    store = ResidentBlocks(find_blocks(model))
    assert [block.name.split(".")[1] for block in store.blocks] == ["attentions", "attentions", "ffns", "ffns"]
    try_walk(model, store, {"input_ids": make_tokens()})
    assert [block.name.split(".")[1] for block in store.blocks] == ["attentions", "ffns", "attentions", "ffns"]


def test_blocks_that_hand_on_more_than_their_output_are_no_chain():
    """The second block reads what the first one left in its module."""
    model = make_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.register_forward_hook(lambda m, args, out: setattr(m, "kept", out))
    second.register_forward_pre_hook(lambda m, args: (args[0] + first.__dict__.pop("kept"),))
    assert tried(model).reason == "its blocks need more than the output of the one before (KeyError)"


@pytest.mark.parametrize(
    ("kind", "collect"),
    [
        ("llama", "order=block, batch_tokens=16"),
        ("llama", "order=sequential, batch_tokens=16"),
        ("llama", "order=sequential, batch_tokens=10000"),
        (LOOPED, "batch_tokens=16"),
    ],
)
def test_statistics_know_the_first_token_of_each_sample(kind, collect, monkeypatch):
    model = make_model(kind) if kind == "llama" else every_class.build(kind)
    observe, seen = StatisticsCollector.observe, []

    def told(collector, name, x, output):
        seen.append(torch.equal(collector.starts.view(x.shape[:2]).sum(1), torch.ones(len(x), dtype=torch.int64)))
        observe(collector, name, x, output)

    monkeypatch.setattr(StatisticsCollector, "observe", told)
    prune_model(model, make_tokens(), PruneConfig(f"collect({collect}) + quantize(bits=8)", max_dense=0.5))
    assert seen
    assert all(seen)


def inputs_of(model, linear, tokens):
    """All inputs ``[tokens, d_in]`` of a Linear in a forward pass of the model, of every call."""
    found = []
    handle = linear.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in tokens.split(2):
            model(batch, use_cache=False)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("kind", [LOOPED, SHARING, TWO_LISTS, TWICE])
@pytest.mark.parametrize("batch_tokens", [16384, 32], ids=["one-batch", "batches"])
def test_masks_are_those_of_all_calls(kind, batch_tokens):
    """Wanda's masks of the first block, whose inputs no pruned weight has changed; each by its definition."""
    model, tokens = every_class.build(kind), make_tokens(4)
    config = PruneConfig(f"collect(order=block, batch_tokens={batch_tokens}) + wanda", max_dense=0.5)
    (block, *_) = find_blocks(model)
    uses = tried(model).uses[block.name]
    used = {child: linear for child, linear in block.linears.items() if uses[child]}
    dense = {child: (linear.weight.clone(), inputs_of(model, linear, tokens)) for child, linear in used.items()}
    reason = tried(model).reason
    report = prune_model(model, tokens, config)
    assert report.whole_forwards == reason
    assert PruneReport.from_json(report.to_json()) == report
    assert ("not walked block by block" in report.table()) is (reason is not None)
    seen = {matrix.name: matrix.tokens for matrix in report.matrices}
    for child, (weight, x) in dense.items():
        assert seen[block.full_name(child)] == len(x)
        if not x.any():  # all scores are 0
            continue
        score = weight.abs() * x.double().norm(dim=0).float()
        kept = torch.zeros_like(score).scatter_(1, score.topk(score.shape[1] // 2, dim=1).indices, 1.0).bool()
        assert ((block.linears[child].weight != 0) != kept).float().mean() < 2e-3, child


def test_a_linear_that_is_called_twice_is_pruned_in_sequential_order():
    """Its statistics are those of both calls, in one batch and in several."""
    reports = []
    for batch_tokens in (16384, 32):
        model = every_class.build(TWICE)
        config = PruneConfig(f"collect(batch_tokens={batch_tokens}) + wanda", max_dense=0.5)
        reports.append({m.name: m.tokens for m in prune_model(model, make_tokens(4), config).matrices})
    name = next(name for name in reports[0] if name.endswith("layers.0.self_attn.relative_pos_embeddings"))
    assert reports[0] == reports[1]
    assert reports[0][name] == 64 + 2 * 64  # tokens of the main stream, and of the two that predict


def test_a_linear_that_text_does_not_use_stays_dense_and_is_listed(tmp_path):
    """Cross attention of a decoder alone. ``verify`` knows it by the report."""
    model = every_class.build(UNUSED, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(InputError, match=r"encoder_attn\.k_proj.* is not called with these inputs: 3\d% of"):
        prune(tmp_path / "dense", tmp_path / "out", calibration={"source": "tokens"})
    report, output = prune(tmp_path / "dense", tmp_path / "out", calibration={"source": "tokens"}, max_dense=0.4)
    unused = {weight.name for weight in report.dense if weight.reason == NOT_CALLED}
    assert unused == {
        f"model.decoder.layers.{i}.encoder_attn.{name}_proj.weight" for i in (0, 1) for name in ("k", "v", "q", "out")
    }
    assert "(not called)" in report.table()
    assert not verify(output).problems
    for config in ({"method": "wanda", "group": "model"}, {"method": "allocate + wanda"}):
        with pytest.raises(InputError, match=r"is not called with these inputs.*--skip 'encoder_attn"):
            prune_model(every_class.build(UNUSED), make_tokens(), PruneConfig(**config, max_dense=0.4))


SHARED = {
    "memory": ("wanda", {}),
    "batches": ("collect(batch_tokens=64) + admm", {}),
    "dense order": ("collect(order=block) + wanda", {}),
    "disk": ("balanced + quantize(bits=4)", {"offload": "disk"}),
    "disk, one forward": ("wanda", {"offload": "disk"}),
}


def stopped_after(blocks, dense, output, monkeypatch, run, method):
    """A run that was interrupted once so many blocks were finished."""
    finish, done = Recorder.finish, []

    def stop(*args, **named):
        finish(*args, **named)
        done.append(args)
        if len(done) == blocks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(dense, output, run, {"source": "tokens"}, method=method)


@pytest.fixture
def shared_kv(tmp_path):
    """A model whose last two of four blocks read keys and values of the first two."""
    every_class.build(SHARED_KV, torch.bfloat16).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "dense"


@pytest.mark.parametrize("blocks", rest_nightly([3], [1, 3]))
@pytest.mark.parametrize("way", rest_nightly(["disk"], SHARED))
def test_a_resumed_run_computes_shared_states_again(way, blocks, shared_kv, tmp_path, monkeypatch):
    """No file holds them."""
    method, run = SHARED[way]
    stopped_after(blocks, shared_kv, tmp_path / "out", monkeypatch, run, method)
    prune(shared_kv, tmp_path / "out", {**run, "resume": True}, {"source": "tokens"}, method=method)
    prune(shared_kv, tmp_path / "whole", run, {"source": "tokens"}, method=method)
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "whole")
    assert not verify(tmp_path / "out").problems


def test_training_with_shared_states_is_not_resumed(shared_kv, tmp_path, monkeypatch):
    """The dense model's are needed, too."""
    method = "wanda + train(epochs=1)"
    stopped_after(2, shared_kv, tmp_path / "out", monkeypatch, {}, method)
    with pytest.raises(InputError, match="share states, which no file holds; start over without --resume"):
        prune(shared_kv, tmp_path / "out", {"resume": True}, {"source": "tokens"}, method=method)
