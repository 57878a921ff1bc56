"""Distillation of a pruned model in memory: loss, gradients, masks, best weights, windows, determinism."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import rest_nightly
from tiny_models import FAMILIES, OFTEN, make_model, make_tokens

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.healing import HealSettings, distill_, loss, window
from ace_ext.healing.batches import Batches, check_passes, windows_needed
from ace_ext.healing.context import HealContext, windows_of
from ace_ext.healing.part import BACK_OFF, checks_of, rate_of, schedule
from ace_ext.healing.settings import BETAS
from ace_ext.healing.trainer import BlockTrainer
from ace_ext.healing.window import Window, WindowStudent
from ace_ext.models.blocks import find_blocks
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.tail import Tail

QUICK = {"learning_rate": 0.015, "step_tokens": 64, "held_out": 4}
TEXT = make_tokens(28, 16, 3)  # 24 windows to train on in 6 steps, 4 held out


def pruned_model(family="llama", dtype=torch.float32, config=None):
    model = make_model(family, dtype)
    prune_model(model, make_tokens(), config or PruneConfig("wanda"))
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def pruned_names(model, skip=()):
    return {f"{b.full_name(child)}.weight" for b in find_blocks(model, skip) for child in b.linears}


def mean_kl(student, teacher, tokens):
    """The mean over tokens of ``KL(teacher ‖ student)``, in float64 from the models' own logits."""
    with torch.no_grad():
        p, q = (model(tokens, use_cache=False).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmaxes", [1, 64 * 2, 2**18], ids=["one-softmax", "two-softmaxes", "all-softmaxes"])
@pytest.mark.parametrize("at_once", [1, 64 * 7, 2**24], ids=["one-token", "seven-tokens", "all"])
def test_loss_and_gradient(at_once, softmaxes, monkeypatch):
    """Against autograd in float64 on the whole logits. Float32 rounds a logit at 2^-24 relative, and a token's loss is
    a sum over 64 of them: 1e-5 is far above both."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(loss, "SOFTMAX_ON_CPU", softmaxes)
    model = make_model("llama")
    blocks = find_blocks(model)
    call = next(iter(capture_calls(model, blocks, [{"input_ids": make_tokens()}])))
    tail = Tail(model, blocks, call.wrap)
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 32, generator=random) for _ in range(2))
    total, gradient = loss.divergence_and_gradient(tail, student, teacher)
    assert loss.divergence(tail, student, teacher) == pytest.approx(total, rel=1e-6)
    exact = copy.deepcopy(model).double()
    x = student.double().requires_grad_(True)
    q, p = (exact.lm_head(exact.model.norm(states)).log_softmax(-1) for states in (x, teacher.double()))
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.shape == student.shape
    torch.testing.assert_close(gradient, x.grad.float(), rtol=1e-4, atol=1e-5)


def test_equal_models_have_no_loss():
    model = make_model("llama")
    healing = distill_(copy.deepcopy(model), model, TEXT, HealSettings(**QUICK))
    assert healing.loss_before == pytest.approx(0.0, abs=1e-6)  # the sum of both models' rounding, which is the same


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", rest_nightly(["llama", "mixtral"], FAMILIES))
def test_the_loss_falls_and_only_kept_weights_change(family):
    dense, model = make_model(family), pruned_model(family)
    before = state(model)
    needs_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    healing = distill_(model, dense, TEXT, HealSettings(**QUICK, passes=8))
    assert healing.loss_after < 0.95 * healing.loss_before
    assert healing.loss_before == healing.checks[0][1]
    assert healing.loss_after == min(loss for _, loss in healing.checks)
    assert (healing.steps, healing.tokens, healing.held_out) == (48, 8 * 24 * 16, 4 * 16)
    assert [step for step, _ in healing.losses] == list(range(1, 49))
    trained = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    matrices = {name.rpartition(".experts.")[0] if ".experts." in name else name for name in pruned_names(model)}
    assert trained <= {name for name in before if any(name.startswith(part) for part in matrices)}
    assert len(trained) >= 3 * 4  # each block's
    for name in trained:
        assert torch.equal(model.state_dict()[name] == 0, before[name] == 0)
        assert not torch.signbit(model.state_dict()[name][before[name] == 0]).any()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs_gradient


@pytest.mark.parametrize("rate", [10, 1e9])
def test_a_rate_that_is_too_high_changes_nothing_and_is_said(rate):
    """With 1e9 it depends on the processor whether losses are finite; None in a report stands for one that is not."""
    dense, model = make_model("llama"), pruned_model()
    before = state(model)
    healing = distill_(model, dense, TEXT, HealSettings(**{**QUICK, "learning_rate": rate}))
    losses = [loss for step, loss in healing.checks if step]
    assert len(losses) == 3
    assert all(loss is None or loss > healing.loss_before for loss in losses)
    assert healing.loss_after == healing.loss_before
    assert rate > 10 or None not in losses
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert healing.summary().endswith("too high: lowered after step 2, 4, 6; no gain, try a lower learning rate")


@pytest.mark.parametrize(("steps", "checks"), [(1, 4), (16, 4), (20, 5), (32, 8), (480, 8)])
def test_short_trainings_are_measured_less_often(steps, checks):
    assert checks_of(steps) == checks


@pytest.mark.parametrize(
    ("divergence", "rate"),
    [(0.0, 0.0), (-1e-9, 0.0), (0.25, 0.00055), (10.0, 0.002), (float("nan"), 0.002), (math.inf, 0.002)],
)
def test_the_default_rate_is_in_proportion_to_the_root_of_the_divergence(divergence, rate):
    assert rate_of(divergence) == pytest.approx(rate)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_default_rate_is_that_of_the_start_in_all_windows(parts):
    settings = HealSettings(**{**QUICK, "learning_rate": None, "passes": 2})
    default, named = pruned_model(), pruned_model()
    found = distill_(default, make_model("llama"), TEXT, settings, context=HealContext(parts=parts))
    rate = found.settings["learning_rate"]
    assert rate == rate_of(found.loss_before) > 0
    again = distill_(
        named, make_model("llama"), TEXT, replace(settings, learning_rate=rate), context=HealContext(parts=parts)
    )
    assert again.losses == found.losses
    assert all(torch.equal(value, state(named)[name]) for name, value in state(default).items())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lm_head", torch.inf, "its logits hold NaN or infinity; a weight of the final norm or of the LM head"),
        (
            "model.layers.2.mlp.down_proj",
            3e38,
            r"the loss of the pruned model .* must be finite to train it \(got nan\)",
        ),
    ],
    ids=["head", "block"],
)
def test_outputs_that_are_not_finite_are_refused(name, value, words):
    dense, model = make_model("llama"), pruned_model()
    for each in (dense, model):
        each.get_submodule(name).weight.data[0] = value
    before = state(model)
    with pytest.raises(InputError, match=words):
        distill_(model, dense, TEXT, HealSettings(**QUICK))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", [3.0, float("nan")], ids=["worse", "not-finite"])
def test_training_that_gets_worse_goes_back_and_on_with_a_lower_rate(bad, parts, monkeypatch):
    """After the first measurement: the weights are the best again, Adam has forgotten them, and each rate from there on
    is lower, also in the windows that follow."""
    dense, model = make_model("llama"), pruned_model()
    before, settings = state(model), HealSettings(**QUICK, passes=2)
    rates, measure, first = (
        [],
        WindowStudent.measure,
        {1: 3, 2: 2}[parts],
    )  # of 12 or 6 steps in four measurements at most

    def step_(student, batch, hidden, teacher, rate):
        if len(rates) == first:
            assert all(torch.equal(value, before[name]) for name, value in state(model).items())
            assert not any(name.endswith("/step") for t in student.trainers.values() for name in t.state())
        rates.append(rate)
        return Window.step_(student, batch, hidden, teacher, rate)

    def measured(student):
        return bad if len(rates) == first else measure(student)

    monkeypatch.setattr(window, "Window", type("Counting", (Window,), {"step_": step_}))
    monkeypatch.setattr(WindowStudent, "measure", measured)
    healing = distill_(model, dense, TEXT, settings, context=HealContext(parts=parts))
    shape = [schedule(step, 12 // parts) for step in range(12 // parts)] * parts
    factors = [1] * first + [BACK_OFF] * (12 - first)
    assert rates == pytest.approx([settings.learning_rate * s * f for s, f in zip(shape, factors, strict=True)])
    assert healing.backed_off == [first]
    assert healing.checks[1] == (first, bad if math.isfinite(bad) else None)
    assert healing.loss_after < healing.loss_before


@pytest.mark.parametrize(
    ("higher", "lowered"),
    [
        ({4: 1.4}, []),
        ({4: 1.4, 8: 1.4}, [8]),
        ({4: 1.4, 8: 1.3}, []),
        ({4: 1.4, 12: 1.4}, []),
        ({4: 1.3, 8: 1.4, 12: 1.4, 16: 1.4}, [8, 16]),
    ],
    ids=str,
)
def test_a_slightly_higher_loss_lowers_the_rate_if_it_stays(higher, lowered, monkeypatch):
    """``higher``: measurements above the start, as multiples of it; there is one after every fourth step."""
    dense, model = make_model("llama"), pruned_model()
    measure, seen = WindowStudent.measure, []

    def measured(student):
        step = 4 * len(seen)
        seen.append(higher[step] * seen[0] if step in higher else measure(student))
        return seen[-1]

    monkeypatch.setattr(WindowStudent, "measure", measured)
    healing = distill_(model, dense, TEXT, HealSettings(**QUICK, passes=4))
    found = {step: loss / healing.loss_before for step, loss in healing.checks if step in higher}
    assert found == pytest.approx(higher)
    assert healing.backed_off == lowered
    assert healing.loss_after < healing.loss_before


def test_measured_losses_are_those_of_the_models():
    dense, model = make_model("llama"), pruned_model()
    held_out = TEXT[-4:]
    before = mean_kl(model, dense, held_out)
    healing = distill_(model, dense, TEXT, HealSettings(**QUICK))
    assert healing.loss_before == pytest.approx(before, rel=1e-4)
    assert healing.loss_after == pytest.approx(mean_kl(model, dense, held_out), rel=1e-4)


def trained_plainly(model, dense, settings):
    """The same training in the plainest way: the model's own logits, autograd through all of it, and Adam."""
    batches = Batches.of(TEXT, settings)
    masks = {name: model.get_parameter(name) != 0 for name in pruned_names(model)}
    trained = {name: model.get_parameter(name) for name in masks}
    sizes = [weight[weight != 0].square().mean().sqrt().item() for weight in trained.values()]
    adam = torch.optim.Adam([{"params": [weight]} for weight in trained.values()], betas=BETAS)
    steps = settings.passes * len(batches.trained)
    for step in range(steps):
        tokens = batches.tokens[batches.order(step, settings.seed)]
        with torch.no_grad():
            p = dense(tokens, use_cache=False).logits.log_softmax(-1)
        q = model(tokens, use_cache=False).logits.log_softmax(-1)
        adam.zero_grad()
        (p.exp() * (p - q)).sum().backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = settings.learning_rate * schedule(step, steps) * size
        adam.step()


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_training_is_what_it_says(family):
    """Rounding differs, and Adam divides by gradients however small, so a few weights may differ by a step or so. On
    the whole the weights must have moved in the same way."""
    dense, model, plain = make_model(family), pruned_model(family), pruned_model(family)
    before, settings = state(model), HealSettings(**QUICK, passes=2)
    healing = distill_(model, dense, TEXT, settings)
    assert healing.loss_after == healing.checks[-1][1]  # the last weights are the best, and were kept
    trained_plainly(plain, dense, settings)
    for name in pruned_names(model):
        moved, expected = (m.get_parameter(name) - before[name] for m in (model, plain))
        assert float((moved - expected).detach().norm() / expected.detach().norm()) < 0.01, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype(dtype, device):
    dense, model = make_model("llama", dtype).to(device), pruned_model("llama", dtype).to(device)
    healing = distill_(model, dense, TEXT, HealSettings(**QUICK, passes=4))
    assert healing.loss_after < 0.9 * healing.loss_before
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_the_best_weights_are_kept_not_the_last():
    """Trained for long on the same few windows, the held-out loss falls and rises again."""
    dense, model = make_model("llama"), pruned_model()
    healing = distill_(model, dense, TEXT[-8:], HealSettings(learning_rate=0.15, step_tokens=64, held_out=2, passes=40))
    losses = [loss for _, loss in healing.checks]
    assert losses[-1] > min(losses) == healing.loss_after
    assert healing.loss_after == pytest.approx(mean_kl(model, dense, TEXT[-2:]), rel=1e-4)


def test_the_same_again_gives_the_same_bits_and_another_seed_does_not():
    outputs = []
    for seed in (0, 0, 1):
        model = pruned_model()
        distill_(model, make_model("llama"), TEXT, HealSettings(**QUICK, seed=seed))
        outputs.append(state(model))
    assert all(torch.equal(value, outputs[1][name]) for name, value in outputs[0].items())
    assert not all(torch.equal(value, outputs[2][name]) for name, value in outputs[0].items())


# --- windows, stored activations, hidden states -----------------------------------------------------------------------


@pytest.mark.parametrize("family", rest_nightly(["llama", "mixtral"], OFTEN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_activations_change_no_bit(family, dtype):
    outputs = []
    for graphs in (0, 1, 3):
        model = pruned_model(family, dtype)
        distill_(model, make_model(family, dtype), TEXT, HealSettings(**QUICK), context=HealContext(graphs=graphs))
        outputs.append(state(model))
    for other in outputs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in outputs[0].items())


@pytest.mark.parametrize("parts", [2, 3])
def test_windows_are_trained_one_after_the_other(parts):
    dense, model = make_model("llama"), pruned_model()
    healing = distill_(model, dense, TEXT, HealSettings(**QUICK, passes=4), context=HealContext(parts=parts))
    assert healing.parts == parts
    assert healing.steps == 24
    assert healing.loss_after == pytest.approx(mean_kl(model, dense, TEXT[-4:]), rel=1e-4)
    assert healing.loss_after < 0.9 * healing.loss_before
    assert healing.zeros == sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in pruned_names(model))


def test_windows_of_blocks():
    assert windows_of(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert windows_of(4, 1) == [range(4)]


@pytest.mark.parametrize("rows", [1, 3, 28])
def test_states_of_the_dense_model_may_come_in_any_batches(rows):
    dense = make_model("llama")
    blocks = find_blocks(dense)
    outputs = []
    with torch.no_grad():
        for call in list(capture_calls(dense, blocks, [{"input_ids": part} for part in TEXT.split(rows)])):
            hidden = call.hidden
            for index, block in enumerate(blocks):
                hidden = run_block(block, hidden, call.others[index])
            outputs.append(hidden)
    model, other = pruned_model(), pruned_model()
    healing = distill_(model, HiddenStates(outputs), TEXT, HealSettings(**QUICK))
    expected = distill_(other, dense, TEXT, HealSettings(**QUICK))
    assert healing.loss_after == pytest.approx(expected.loss_after, rel=1e-3)  # other batches round differently


# --- masks ------------------------------------------------------------------------------------------------------------


def test_skipped_matrices_are_not_trained():
    skip = (r"\.down_proj$", r"layers\.0\.")
    dense = make_model("llama")
    model = pruned_model(config=PruneConfig("wanda", skip=skip))
    before = state(model)
    distill_(model, dense, TEXT, HealSettings(**QUICK), skip=skip)
    trained = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert trained == pruned_names(model, skip)


def test_given_masks_hold():
    """A mask may keep a weight that is zero; it is then trained."""
    dense, model = make_model("llama"), pruned_model()
    masks = {name.removesuffix(".weight"): model.get_parameter(name) != 0 for name in pruned_names(model)}
    name = next(iter(masks))
    weight = model.get_parameter(f"{name}.weight")
    place = tuple(masks[name].nonzero()[0].tolist())
    weight.data[place] = 0.0
    distill_(model, dense, TEXT, HealSettings(**QUICK), masks=masks)
    assert weight[place] != 0
    assert all(torch.equal(model.get_parameter(f"{child}.weight") != 0, mask) for child, mask in masks.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda masks, name: masks.pop(name),
        lambda masks, name: masks[name].zero_(),
        lambda masks, name: masks.update({name: masks[name].float()}),
        lambda masks, name: masks.update({name: None}),
    ],
)
def test_masks_that_do_not_fit_are_refused(change):
    dense, model = make_model("llama"), pruned_model()
    masks = {name.removesuffix(".weight"): model.get_parameter(name) != 0 for name in pruned_names(model)}
    change(masks, "model.layers.1.mlp.up_proj")
    before = state(model)
    with pytest.raises(InputError, match=r"masks must .*model\.layers\.1\.mlp\.up_proj"):
        distill_(model, dense, TEXT, HealSettings(**QUICK), masks=masks)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_matrix_that_is_stored_transposed_is_trained_as_any_other():
    """As those of GPT-2 and the experts of GPT-OSS are. Each gradient changes its own weight and no other."""

    def trained(store):
        block = find_blocks(pruned_model())[0]
        linear = block.linears["mlp.down_proj"]
        linear.weight = torch.nn.Parameter(store(linear.weight.detach()))
        trainer = BlockTrainer(block)
        for seed in range(2):
            draw = torch.Generator().manual_seed(seed)
            trainer.take(
                {child: torch.randn(weight.shape, generator=draw) for child, weight in trainer.weights.items()}
            )
            trainer.step_(0.01)
            trainer.restore_(copy.deepcopy(trainer.state()))
        return linear.weight

    plain, transposed = trained(torch.clone), trained(lambda weight: weight.T.contiguous().T)
    assert not transposed.is_contiguous()
    assert torch.equal(transposed, plain)


def test_a_kept_weight_that_rounds_to_zero_stays_kept():
    block = find_blocks(pruned_model("llama", torch.float16))[0]
    trainer = BlockTrainer(block)
    best, mask = trainer.snapshot(), trainer.masks["mlp.up_proj"]
    (one, two), others = mask.nonzero()[:2], best["mlp.up_proj"][mask][2:]
    best["mlp.up_proj"][tuple(one)], best["mlp.up_proj"][tuple(two)] = 0.0, -0.0
    best["mlp.up_proj"][~mask] = -0.0
    trainer.put_(best)
    trainer.check(block)
    found = trainer.weights["mlp.up_proj"][mask]
    least = torch.finfo(torch.float16).tiny
    assert found[:2].tolist() == [least, -least]
    assert torch.equal(found[2:], others)
    assert not torch.signbit(trainer.weights["mlp.up_proj"][~mask]).any()


@pytest.mark.parametrize("at_kept", [True, False])
def test_a_zero_that_moved_is_found(at_kept):
    """Before a window is written: a kept weight that became zero, and a pruned one that came back."""
    block = find_blocks(pruned_model())[0]
    trainer = BlockTrainer(block)
    trainer.check(block)
    weight = trainer.weights["mlp.up_proj"]
    row, col = (weight != 0).nonzero()[0] if at_kept else (weight == 0).nonzero()[0]
    with torch.no_grad():
        weight[row, col] = 0.0 if at_kept else 1.0
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp\.up_proj: training changed which weights are zero"):
        trainer.check(block)


# --- text -------------------------------------------------------------------------------------------------------------


def test_windows_that_share_text_with_a_held_out_one_are_left_out():
    text = make_tokens(1, 400, 5)[0]
    windows = text[:384].view(12, 32).clone()
    windows[3] = text[384 - 32 - 16 : 384 - 16]  # ends with the first 16 tokens of the last window
    batches = Batches.of(windows, HealSettings(step_tokens=32, held_out=1))
    assert [batch[0].tolist() for batch in batches.tokens] == [windows[i].tolist() for i in range(12) if i != 3]
    assert list(batches.measured) == [10]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (make_tokens()[0], r"at least two windows \[nsamples, seqlen\].*got shape \[16\]"),
        (make_tokens(1), r"got shape \[1, 16\]"),
        (make_tokens().to("meta"), "tokens must be an ordinary tensor with data"),
        (make_tokens().tolist(), r"tokens must be a tensor \[nsamples, seqlen\] \(got list\)"),
        (make_tokens(1).repeat(9, 1), "each of the 7 windows shares text with one of the 2 that are held out"),
    ],
)
def test_text_that_does_not_serve(tokens, message):
    with pytest.raises(InputError, match=message):
        distill_(pruned_model(), make_model("llama"), tokens, HealSettings(**QUICK))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, r"model must be a model, .* \(got NoneType\)"),
        ("teacher", torch.zeros(8, 16, 32), r"teacher must be the dense model, or its HiddenStates \(got Tensor\)"),
        ("settings", {"passes": 2}, r"settings must be HealSettings \(got dict\)"),
        ("masks", 5, r"masks must be bool tensors by the full names of the matrices \(got int\)"),
        ("grid", 4, r"grid must be an ace_ext\.grids\.Grid \(got int\)"),
        ("skip", 5, r"skip must be regular expressions \(got 5\)"),
    ],
)
def test_arguments_of_other_types_are_refused(name, value, message):
    given = {"model": make_model("llama"), "teacher": make_model("llama"), "tokens": TEXT}
    with pytest.raises(InputError, match=message):
        distill_(**{**given, name: value})


@pytest.mark.parametrize("tokens", [1, 64, 65, 640, 5000])
@pytest.mark.parametrize("passes", [1, 3])
def test_windows_needed_for_a_budget(tokens, passes):
    settings = HealSettings(step_tokens=64, held_out=8, passes=passes)
    count = windows_needed(tokens, 16, settings)
    batches = Batches.of(make_tokens(count, 16, 7), settings)
    trained = passes * sum(batches.tokens[i].numel() for i in batches.trained)
    assert tokens <= trained < tokens + passes * 64
    assert sum(len(batches.tokens[i]) for i in batches.measured) <= 8


def test_passes_that_a_budget_has_no_steps_for():
    settings = HealSettings(step_tokens=64, passes=3)
    check_passes(192, 16, settings)
    check_passes(1, 16, HealSettings(step_tokens=64))
    with pytest.raises(InputError, match=r"^passes must be at most 2 for 191 tokens: .* 64 tokens \(got 3\)"):
        check_passes(191, 16, settings)


def test_each_pass_has_each_batch_once_in_another_order():
    batches = Batches.of(TEXT, HealSettings(**QUICK))
    orders = [[batches.order(step, 0) for step in range(6 * done, 6 * done + 6)] for done in range(3)]
    assert [sorted(order) for order in orders] == [list(range(6))] * 3
    assert len({tuple(order) for order in orders}) > 1


def test_schedule():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert schedule(0, 1) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("step_tokens", 0), ("passes", 0), ("held_out", 0), ("seed", -1), ("passes", 1.5)],
)
def test_settings_have_limits(name, value):
    with pytest.raises(InputError, match=name):
        HealSettings(**{name: value})
