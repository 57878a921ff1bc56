"""Removed heads: a class with fewer of them loads the result, and what contributes nothing goes unnoticed."""

import every_class
import pytest
import torch
import transformers
from tiny_models import grouped, make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning.removal import Heads, removal_of
from ace_ext.structures import rehearsal
from ace_ext.structures.rehearsal import Rehearsal
from ace_ext.structures.remove import planned_removal
from ace_ext.structures.scores import greedy_groups, turning
from ace_ext.structures.search import find_units


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen3", "Gemma"])
@pytest.mark.parametrize("score", ["obs", "variance", "cosine"])
def test_a_group_that_contributes_nothing_is_the_one_that_goes(kind, score, tmp_path):
    model, tokens = grouped(kind), make_tokens(16, 32)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[8:24] = 0  # the second and the third KV head
    expected = logits(model, tokens)
    kept = model.model.layers[0].self_attn.q_proj.weight[48:].clone()
    report = prune_model(model, tokens, remove=f"heads=0.5(score={score})")
    record = report.removed[0]
    assert (record.kind, record.setting, record.before, record.after) == ("heads", "num_attention_heads", 8, 4)
    assert relative(logits(model, tokens), expected) < 1e-4
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight[16:], kept)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.num_attention_heads, again.config.num_key_value_heads, again.config.head_dim) == (4, 2, 8)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("silent", [0, 1])
def test_of_two_groups_the_one_that_contributes_nothing_goes(silent):
    """The other one makes all of the output of attention, so that without it there is no direction to compare."""
    model, tokens = grouped(kv_heads=2), make_tokens(16, 32)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data[8 * silent : 8 * silent + 8] = 0
    expected = logits(model, tokens)
    prune_model(model, tokens, remove="heads=0.5")
    assert relative(logits(model, tokens), expected) < 1e-4


def test_heads_and_neurons_and_blocks_go_together():
    model, tokens = grouped(), make_tokens(16, 32)
    report = prune_model(model, tokens, remove="neurons=0.25 + heads=0.5 + blocks=1", pattern="2:4")
    assert [(record.kind, record.after) for record in report.removed] == [("blocks", 2), ("heads", 4), ("neurons", 72)]
    shapes = {matrix.name.rpartition(".")[2]: matrix.shape for matrix in report.matrices}
    assert shapes["q_proj"] == (32, 64)
    assert shapes["k_proj"] == (16, 64)
    assert shapes["o_proj"] == (64, 32)
    assert report.sparsity == 0.5
    assert torch.isfinite(logits(model, tokens)).all()


def test_least_squares_lowers_the_error_of_the_output():
    tokens, errors = make_tokens(64, 32), []
    dense = logits(grouped(), tokens)
    for refit in ("none", "matrix"):
        model = grouped()
        prune_model(model, tokens, remove=f"heads=0.5(refit={refit})")
        errors.append(relative(logits(model, tokens), dense))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("opt", "has no head_dim, so engines derive the size of a head from num_attention_heads"),
        ("qwen2", "has no head_dim, so engines derive the size of a head from num_attention_heads"),
        ("mamba", "does not say how many heads"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_changes(family, words):
    model, tokens = make_model(family), make_tokens(4, 16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=words):
        prune_model(model, tokens, remove="heads=0.5")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("kind", "part"), [("minimax_m2", "heads=0.5"), ("minicpm3", "blocks=1")])
def test_a_plan_refuses_what_a_run_refuses(kind, part):
    """MiniMax-M2 has a norm over all heads, and MiniCPM3 scales what a block adds by the number of blocks. Shapes show
    neither."""
    model = every_class.build(kind)
    blocks, wanted = find_blocks(model), removal_of(part)
    with pytest.raises(InputError, match="does not compute the same as with their weights zeroed"):
        planned_removal(model, blocks, wanted, Rehearsal(model, blocks))
    with pytest.raises(InputError, match="does not compute the same as with their weights zeroed"):
        prune_model(model, make_tokens(8, 16), remove=part)


def test_a_rehearsal_takes_the_first_block_of_each_kind(monkeypatch):
    model = every_class.build("minimax_m2")
    blocks, size = find_blocks(model), sum(parameter.numel() for parameter in model.parameters())
    own = sum(parameter.numel() for parameter in blocks[0].module.parameters())
    monkeypatch.setattr(rehearsal, "MOST", size - own)
    with pytest.raises(InputError, match="does not compute the same"):
        Rehearsal(model, blocks)(removal_of("heads=0.5"))
    monkeypatch.setattr(rehearsal, "MOST", own)
    assert not Rehearsal(model, blocks)(removal_of("heads=0.5"))


def test_a_number_that_the_class_refuses_is_named():
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be built with num_attention_heads=6"):
        prune_model(grouped(), make_tokens(4, 16), remove="heads=0.25")


def test_heads_that_share_one_kv_head_are_refused():
    model = grouped()
    model.config.num_key_value_heads = 1
    shared = transformers.LlamaForCausalLM(model.config).eval()
    with pytest.raises(InputError, match="share one KV head"):
        find_units(shared, find_blocks(shared), Heads(0.5))


def test_groups_are_removed_as_by_trying_each():
    """The reference removes each group in turn, fits the others by least squares, and takes the one with the least
    error."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    gram, left = (h.T @ h / 400).double(), [0, 1, 2, 3]
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    w = weight.double()
    while len(left) > 2:
        errors = {}
        for group in left:
            columns = [3 * g + i for g in left if g != group for i in range(3)]
            fitted = torch.linalg.solve(gram[columns][:, columns], gram[columns] @ w.T).T
            change = w.clone()
            change[:, columns] -= fitted
            errors[group] = float(((change @ gram) * change).sum())
        left.remove(min(errors, key=errors.get))
    assert greedy_groups(weight, h.T @ h / 400, 2, 3).tolist() == left


def test_turning_of_a_group_is_the_change_of_direction():
    generator = torch.Generator().manual_seed(2)
    h, rest = torch.randn(50, 6, generator=generator), 10 * torch.randn(50, 8, generator=generator)
    weight = 0.1 * torch.randn(8, 6, generator=generator)
    output = rest + h @ weight.T
    expected = []
    for columns in (slice(0, 3), slice(3, 6)):
        without = output - h[:, columns] @ weight[:, columns].T
        expected.append(float(2 * (1 - torch.cosine_similarity(without.double(), output.double())).sum()))
    torch.testing.assert_close(turning(h, output, weight, 3), torch.tensor(expected), rtol=1e-4, atol=0)


def test_blocks_that_read_the_keys_of_others_keep_their_heads():
    """Each block chooses its heads, so the keys that one reads would be those of other heads."""
    model = every_class.build("gemma4_text")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"read keys and values of others.*; leave out heads"):
        prune_model(model, make_tokens(), remove="heads=0.5")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
