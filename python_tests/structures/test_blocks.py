"""Removed blocks: one that does nothing goes first, and the configuration fits what stays."""

import copy

import every_class
import pytest
import torch
import transformers
from tiny_models import DENSE_FAMILIES, MIXTURES, make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.runs.verify import verify
from ace_ext.structures.blocks import least_influence


def logits(model, tokens, **more):
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_block_that_adds_nothing_goes_and_no_bit_of_the_output_changes(family, place):
    model, tokens = make_model(family), make_tokens(8, 16)
    last = ("out_proj", "fc2") if family == "opt" else ("o_proj", "down_proj")
    block = find_blocks(model)[place]
    for name, parameter in block.module.named_parameters():
        if name.split(".")[-2] in last:
            parameter.data.zero_()
    expected = logits(model, tokens)
    report = prune_model(model, tokens, remove="blocks=1")
    assert [(gone.name, round(gone.influence, 6)) for gone in report.removed[0].dropped] == [(block.name, 0.0)]
    assert torch.equal(logits(model, tokens), expected)


KINDS = ["sliding_attention", "full_attention"] * 2
NUMBERED = [
    ("deepseek_v3", "first_k_dense_replace", 2, 1, {}),
    ("qwen3_moe", "mlp_only_layers", [1, 3], [2], {}),
    (
        "gemma4_text",
        "per_layer_config",
        {"1": {"head_dim": 16}, "3": {"head_dim": 16}},
        {"2": {"head_dim": 16}},
        {"layer_types": KINDS, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
]
"""Classes with a setting that says which blocks are of another kind, its value, and that without the second block."""


@pytest.mark.parametrize(("kind", "setting", "value", "without", "more"), NUMBERED)
def test_settings_of_blocks_by_number_follow(tmp_path, kind, setting, value, without, more):
    config = transformers.CONFIG_MAPPING[kind]
    given = every_class.shrunk(config(), {"num_hidden_layers": 4, setting: value, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(**given)).eval()
    tokens = make_tokens(8, 16)
    for name, parameter in model.model.layers[1].named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    expected = logits(model, tokens)
    report = prune_model(model, tokens, remove="blocks=1")
    assert [gone.name for gone in report.removed[0].dropped] == ["model.layers.1"]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_dict()[setting] == without
    torch.testing.assert_close(logits(again, tokens), expected)  # kernels may round differently at other addresses


@pytest.mark.parametrize("place", [1, 2])
def test_a_list_with_an_entry_for_each_block_is_the_depth_where_no_number_is(tmp_path, place):
    """The class has as many heads as blocks. Without the block with attention another number of heads would fit too,
    but then it writes no text."""
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention"]
    given = every_class.shrunk(transformers.NemotronHConfig(), {"layers_block_type": kinds})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**given)).eval()
    tokens = make_tokens(4, 16)
    for parameter in model.model.layers[place].mixer.parameters():
        parameter.data.zero_()
    if kinds[place] == "full_attention":
        with pytest.raises(InputError, match="does not write text without these blocks"):
            prune_model(model, tokens, remove="blocks=1(score=published-shortgpt)")
        assert (model.config.layers_block_type, model.config.num_attention_heads) == (kinds, 4)
        return
    report = prune_model(model, tokens, remove="blocks=1(score=published-shortgpt)")
    assert (report.removed[0].setting, report.removed[0].before) == ("layers_block_type", 4)
    model.save_pretrained(tmp_path)
    report.save(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.layers_block_type == [*kinds[:place], *kinds[place + 1 :]]
    assert again.config.num_attention_heads == 4
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert verify(tmp_path, load=False).problems == []


def test_a_list_of_numbers_may_not_be_of_blocks():
    model = every_class.build("bamba")
    assert len(model.config.time_step_limit) == len(find_blocks(model))
    prune_model(model, make_tokens(4, 16), remove="blocks=1")
    assert len(model.config.time_step_limit) == 2


@pytest.mark.parametrize("family", [*DENSE_FAMILIES, *MIXTURES, "mamba"])
def test_plain_transformers_loads_the_smaller_model(tmp_path, family):
    model, tokens = make_model(family), make_tokens(8, 16)
    report = prune_model(model, tokens, remove="blocks=0.3")
    assert (report.removed[0].before, report.removed[0].after) == (3, 2)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    kinds = getattr(again.config, "layer_types", None)
    assert kinds is None or len(kinds) == again.config.num_hidden_layers == 2


def test_the_smaller_model_generates_with_a_cache():
    """Blocks are numbered anew, so each has its own place in the cache."""
    model, tokens = make_model("gemma3"), make_tokens(8, 16)
    prune_model(model, tokens, remove="blocks=1 + neurons=0.25")
    step = model.generate(tokens[:2], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    for length in range(16, 20):
        assert torch.equal(logits(model, step[:, :length])[:, -1].argmax(-1), step[:, length])


def test_a_model_that_would_write_no_more_text_is_refused():
    """Its class finds the length of a text in the cache of a block with attention, and has one such block here."""
    model, tokens = every_class.build("qwen3_next"), make_tokens(8, 16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"does not write text without these blocks: .*; leave out blocks, or remove"):
        prune_model(model, tokens, remove="blocks=1")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shortgpt_measures_once_in_the_dense_model():
    model, batches = make_model("llama"), [{"input_ids": make_tokens(8, 16)}]
    blocks = find_blocks(model)
    with torch.no_grad():
        (call,) = capture_calls(model, blocks, batches)
        hidden, influence = call.hidden, []
        for index, block in enumerate(blocks):
            output = run_block(block, hidden, call.others[index])
            influence.append(float((1 - torch.cosine_similarity(hidden, output, dim=-1)).mean()))
            hidden = output
    order = sorted(range(3), key=influence.__getitem__)[:2]
    report = prune_model(model, batches[0]["input_ids"], remove="blocks=2(score=published-shortgpt)")
    dropped = report.removed[0].dropped
    assert [gone.name for gone in dropped] == [blocks[index].name for index in order]
    assert [gone.influence for gone in dropped] == pytest.approx([influence[index] for index in order], rel=1e-3)


def test_influence_is_measured_again_without_the_blocks_that_are_gone():
    model, batches = make_model("llama"), [{"input_ids": make_tokens(8, 16)}]
    blocks = find_blocks(model)
    with torch.no_grad():
        found = least_influence(model, blocks, batches, 2)
        (call,) = capture_calls(model, blocks, batches)
        hidden, influence = call.hidden, {}
        for index, block in enumerate(blocks):
            if index == found[0][0]:
                continue
            output = run_block(block, hidden, call.others[index])
            influence[index] = float((1 - torch.cosine_similarity(hidden, output, dim=-1)).mean())
            hidden = output
    assert found[1][0] == min(influence, key=influence.get)
    assert found[1][1] == pytest.approx(influence[found[1][0]], rel=1e-4)


@pytest.mark.parametrize("amount", ["blocks=3", "blocks=0.1", "blocks=7"])
def test_one_block_goes_and_one_stays_at_least(amount):
    with pytest.raises(InputError, match="at least one must go and one stay"):
        prune_model(make_model("llama"), make_tokens(4, 16), remove=amount)


def test_a_model_that_calls_blocks_out_of_order_is_refused():
    model = make_model("zamba")
    with pytest.raises(InputError, match="same tensor"):
        prune_model(model, make_tokens(4, 16), remove="blocks=1")


def test_the_only_block_of_its_kind_stays():
    """The cache of transformers needs a block with attention."""
    model = make_model("llama")
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))  # so it is of another kind
    with torch.no_grad():  # and does nothing
        for matrix in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            matrix.weight.zero_()
    batches, blocks = [{"input_ids": make_tokens(4, 16)}], find_blocks(model)
    with torch.no_grad():
        assert least_influence(model, blocks, batches, 1, once=True)[0][0] == 1
        assert least_influence(model, blocks, batches, 1)[0][0] != 1
