"""A share of the parameters: candidates of about that size, and the one whose predictions are nearest."""

import math
from types import SimpleNamespace

import every_class
import pytest
import torch
import transformers
from tiny_models import grouped, make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning.removal import SCORES, removal_of
from ace_ext.structures.choice import _split, candidates, divergence
from ace_ext.structures.rehearsal import Rehearsal
from ace_ext.structures.remove import planned_removal


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def block_parameters(model) -> int:
    return sum(p.numel() for block in find_blocks(model) for p in block.module.parameters())


def test_the_nearest_candidate_stays():
    model, dense, tokens = grouped("Mistral"), grouped("Mistral"), make_tokens(16, 32)
    report = prune_model(model, tokens, remove="params=0.3")
    tried = report.removed[0].tried
    assert len(tried) >= 3
    assert {"blocks=1"} < {one.part for one in tried}
    best = min(tried, key=lambda one: one.divergence)
    whole = sum(p.numel() for p in dense.parameters())
    for one in tried:
        assert abs((whole - one.parameters_after) / block_parameters(dense) - 0.3) <= 0.15 * 0.3
    assert [removal_of(record.part) for record in report.removed] == [
        removal_of(part) for part in best.part.split(" + ")
    ]
    assert sum(p.numel() for p in model.parameters()) == best.parameters_after
    held = _split([{"input_ids": tokens}])[1]
    assert divergence(dense, model, held) == pytest.approx(best.divergence, rel=1e-4)
    assert report.config["remove"] == "params=0.3"
    assert "nearest of" in report.removed[0].summary()


def test_a_block_that_does_nothing_is_chosen():
    model, tokens = grouped(), make_tokens(16, 32)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[1].get_submodule(name).weight.data.zero_()
    expected = logits(model, tokens)
    report = prune_model(model, tokens, remove="params=0.33")
    assert [record.kind for record in report.removed] == ["blocks"]
    assert torch.equal(logits(model, tokens), expected)
    assert min(one.divergence for one in report.removed[0].tried) < 1e-6


@pytest.mark.parametrize("part", ["neurons=0.25(score=auto)", "heads=0.5(score=auto) + neurons=0.25(score=auto)"])
def test_the_score_with_the_nearest_predictions_stays(part):
    model, tokens = grouped("Mistral"), make_tokens(16, 32)
    used, held = _split([{"input_ids": tokens}])
    expected = {}
    for score in SCORES:
        other = grouped("Mistral")
        prune_model(other, used, remove=part.replace("auto", score))
        expected[str(removal_of(part.replace("auto", score)))] = divergence(model, other, held)
    dense = grouped("Mistral")
    planned = planned_removal(dense, find_blocks(dense), removal_of(part))[1]
    report = prune_model(model, tokens, remove=part)
    tried = report.removed[0].tried
    assert {one.part: one.divergence for one in tried} == pytest.approx(expected, rel=1e-5)
    assert [one.part for one in planned[0].tried] == [one.part for one in tried]
    assert planned[-1].parameters_after == report.removed[-1].parameters_after
    best = min(tried, key=lambda one: one.divergence)
    assert " + ".join(record.part for record in report.removed) == best.part
    assert report.config["remove"] == part


def test_a_score_that_reads_the_wrong_text_is_not_chosen():
    """``obs`` removes what calibration does not need: twins are alike in it, and the other scores see neither."""
    model, tokens = make_model("llama"), make_tokens(24, 32)
    for block in model.model.layers:
        for matrix in (block.mlp.gate_proj, block.mlp.up_proj):
            matrix.weight.data[36:48] = matrix.weight.data[24:36]
        block.mlp.down_proj.weight.data[:, 24:] *= 3
    report = prune_model(model, tokens, remove="neurons=0.25(score=auto)")
    assert report.removed[0].part == "neurons=0.25(score=obs)"


def test_a_plan_lists_the_candidates():
    model = grouped()
    smaller, records = planned_removal(model, find_blocks(model), removal_of("params=0.3"))
    assert records[0].tried == candidates(
        model,
        find_blocks(model),
        removal_of("params=0.3"),
        lambda wanted: planned_removal(model, find_blocks(model), wanted),
        lambda wanted: None,
    )
    assert "candidates" in records[0].summary()
    assert all(p.is_meta for p in smaller.parameters())


def test_a_candidate_that_the_class_does_not_compute_is_left_out():
    """MiniMax-M2 has a norm over all heads, so it computes something else without some of them."""
    sizes = {"num_key_value_heads": 4, "intermediate_size": 64}
    config = transformers.MiniMaxM2Config(**every_class.shrunk(transformers.MiniMaxM2Config(), sizes))
    model, tokens = transformers.MiniMaxM2ForCausalLM(config).eval(), make_tokens(2, 8)
    wanted, blocks = removal_of("params=0.3"), find_blocks(model)
    plain = planned_removal(model, blocks, wanted)[1][0].tried
    planned = planned_removal(model, blocks, wanted, Rehearsal(model, blocks))[1][0].tried
    assert [one.part for one in plain if "heads" not in one.part] == [one.part for one in planned]
    assert len(planned) < len(plain)
    report = prune_model(model, tokens, remove="params=0.3")
    assert [one.part for one in report.removed[0].tried] == [one.part for one in planned]


def test_what_a_batch_holds_once_for_all_samples_is_not_split():
    place = torch.arange(12)[None]
    used, held = _split([{"input_ids": torch.arange(48).view(4, 12), "position_ids": place}])
    assert all(torch.equal(batch["position_ids"], place) for batch in (*used, *held))
    assert sum(len(batch["input_ids"]) for batch in (*used, *held)) == 4


def test_divergence_of_tokens_that_are_excluded():
    class Head(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.tensor([[logits]])

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.logits)

    dense, other = Head([0.0, 0.0, -torch.inf]), Head([0.0, torch.tensor(3.0).log(), -torch.inf])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(dense, other, [{"input_ids": torch.zeros(1, 1)}]) == pytest.approx(expected, rel=1e-6)


def test_divergence_is_that_of_the_next_token_without_padding():
    dense, other, tokens = make_model("llama"), make_model("llama", seed=1), make_tokens(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    with torch.no_grad():
        found = divergence(dense, other, [{"input_ids": tokens, "attention_mask": mask}])
        p, q = (m(input_ids=tokens, attention_mask=mask).logits.double().log_softmax(-1) for m in (dense, other))
    each = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found == pytest.approx(float(each[mask.bool()].mean()), rel=1e-4)


def test_held_out_samples_calibrate_nothing():
    batches = [{"input_ids": torch.arange(rows)[:, None] + start} for start, rows in ((0, 5), (5, 12))]
    used, held = _split(batches)
    numbers = [torch.cat([batch["input_ids"] for batch in part])[:, 0].tolist() for part in (used, held)]
    assert numbers[1] == [7, 15]
    assert sorted(numbers[0] + numbers[1]) == list(range(17))


@pytest.mark.parametrize(
    ("family", "tokens", "words"),
    [
        ("llama", (1, 16), "at least two calibration samples"),
        ("mixtral", (4, 16), "no removal of neurons, heads or blocks takes about"),
    ],
)
def test_what_cannot_be_chosen_is_refused_and_nothing_changes(family, tokens, words):
    model = make_model(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=words):
        prune_model(model, make_tokens(*tokens), remove="params=0.05" if family == "mixtral" else "params=0.3")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("more", [{}, {"attention_mask": torch.ones(8, 16, dtype=torch.long)}], ids=["plain", "mask"])
@pytest.mark.parametrize("remove", ["params=0.3", "neurons=0.25(score=auto)"])
def test_a_classifier_does_not_predict_tokens(remove, more):
    config = make_model("llama").config
    config.num_labels, config.pad_token_id = 3, 0
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(InputError, match="compare predictions of tokens"):
        prune_model(model, [{"input_ids": make_tokens(8, 16), **more}], remove=remove)
