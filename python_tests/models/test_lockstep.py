"""Several batches in the sequential order: one forward's work a block, and the bytes of one forward for each step."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from helpers import rest_nightly
from tiny_models import FAMILIES, MIXTURES, make_model, make_tokens
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.engine import batch_states
from ace_ext.engine.context import RunContext
from ace_ext.engine.strategies import in_lockstep
from ace_ext.engine.walk import Walk
from ace_ext.models.blocks import find_blocks
from ace_ext.models.lockstep import Lockstep, keeps_no_state, paused_bytes
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.torch_state import TorchState
from ace_ext.ops._extension import compiled
from ace_ext.process_memory import resident_bytes
from ace_ext.pruning import statistics


def pruned(model, keeps_forwards: bool, tokens=None, method="wanda", collect="batch_tokens=16", **config):
    """The reports of all matrices, and the context; by six batches of one sample. ``collect``: options of this stage,
    which comes before ``method``."""
    context = RunContext(keeps_forwards=keeps_forwards)
    config = PruneConfig(f"collect({collect}) + {method}", **config)
    report = prune_model(model, make_tokens() if tokens is None else tokens, config, context=context)
    return [vars(matrix) for block in report.blocks for matrix in block.matrices], context


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_are_those_of_stages(family):
    one, other = make_model(family), make_model(family)
    (reports, context), (expected, _) = pruned(one, True), pruned(other, False)
    assert set(context.stateless.values()) == {True}
    assert_same(one, other)
    assert reports == expected


@pytest.mark.parametrize(
    "config",
    [
        {"method": "cosp"},
        {"method": "ace", "collect": "batch_tokens=16, token_norm=exact", "pattern": "2:4"},
        {"method": "admm"},
        {"method": "admm + quantize"},
        {"method": "obs(gram=cosine)", "group": "matrix"},
        {"method": "wanda + train(epochs=1)"},
        {"method": "allocate + wanda", "skip": (r"layers\.1\.", "q_proj", r"experts\.1\.")},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", rest_nightly(["qwen3-moe"], ["llama", "qwen3-moe"]))
def test_the_bytes_are_those_of_stages_with_every_kind_of_statistics(family, config):
    if family == "llama":
        config = {**config, "skip": config.get("skip", ())[:2]}
    one, other = make_model(family, torch.bfloat16), make_model(family, torch.bfloat16)
    assert pruned(one, True, **config)[0] == pruned(other, False, **config)[0]
    assert_same(one, other)


def test_padding_and_batches_of_several_sizes():
    tokens, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask}, make_tokens(1, 20, seed=1), make_tokens(3, 5, seed=2)]
    for family in ("gemma3", "mixtral"):
        one, other = make_model(family), make_model(family)
        assert pruned(one, True, batches)[0] == pruned(other, False, batches)[0]
        assert_same(one, other)


@pytest.fixture
def flops(monkeypatch):
    """Counts the floating point operations of every forward of a block, also of those that end early, and of dense
    outputs that lockstep computes for statistics."""
    counted = []

    def counting(real):
        def call(*arguments):
            with FlopCounterMode(display=False) as counter:
                try:
                    return real(*arguments)
                finally:
                    counted.append(counter.get_total_flops())

        return call

    for place in ("models.replay", "models.lockstep", "models.padded_experts", "engine.strategies.in_steps"):
        monkeypatch.setattr(f"ace_ext.{place}.run_block", counting(run_block))
    monkeypatch.setattr(in_lockstep, "output_of_linear", counting(in_lockstep.output_of_linear))
    return counted


@pytest.mark.parametrize("metric", ["wanda", "cosp"], ids=["inputs", "outputs"])
@pytest.mark.parametrize("keeps_forwards", [True, False], ids=["lockstep", "steps"])
def test_work_of_a_block(keeps_forwards, metric, flops):
    """16 batches, as 128 samples of 2048 tokens are by default. Lockstep takes one forward pass and a sixteenth, in
    which it finds the order of the Linears; each Linear runs twice if the statistics read its dense output."""
    model, tokens = make_model("llama"), make_tokens(16, 128)
    model.set_attn_implementation("eager")  # whose products the counter knows
    blocks = find_blocks(model)
    (call,) = capture_calls(model, blocks, [{"input_ids": tokens}])
    with FlopCounterMode(display=False) as counter:
        run_block(blocks[0], call.hidden, call.others[0])
    whole = counter.get_total_flops()
    pruned(model, keeps_forwards, tokens, metric, "batch_tokens=128")
    passes = sum(flops) / whole / len(blocks)
    print(f"{passes:.2f} forward passes a block")
    assert passes > 1
    assert passes < (2 if keeps_forwards else 4)
    if keeps_forwards and metric == "wanda":
        assert passes < 1.2  # with the trial whether forwards can take turns, which is shared by all blocks


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which the program would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["block", "sequential"])
@pytest.mark.parametrize("batch_tokens", [48, 16])
def test_numbers_are_read_once_a_block(order, batch_tokens, monkeypatch):
    """Whether outputs are finite; the figures of the matrices come as one tensor. The trial of the first block reads
    two more."""
    counts, real = [], Walk._run_block

    def run_block(walk, *given):
        with Reads() as reads:
            real(walk, *given)
        counts.append(reads.count)

    monkeypatch.setattr(Walk, "_run_block", run_block)
    monkeypatch.setattr(batch_states, "read_at_once", lambda _: False)  # as on a GPU
    monkeypatch.setattr(statistics, "reads_at_once", lambda _: False)
    pruned(make_model("llama"), True, collect=f"order={order}, batch_tokens={batch_tokens}")
    assert counts == [3 if order == "sequential" else 1, 1, 1]


class Forgetful(nn.Module):
    """Adds what it noted in itself at the start of its forward, as no block of transformers does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        self.noted = x
        return self.mlp(x) + self.noted


def test_a_block_that_keeps_state_is_pruned_in_steps():
    models = [make_model("llama") for _ in range(2)]
    for model in models:
        model.model.layers[1].mlp = Forgetful(model.model.layers[1].mlp)
    (reports, context), (expected, _) = pruned(models[0], True), pruned(models[1], False)
    assert sorted(context.stateless.values()) == [False, True]
    assert reports == expected
    assert_same(*models)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
def test_hundreds_of_batches():
    """They hold no more than is counted, and no thread is made."""
    pruned(make_model("llama"), True)  # libraries are loaded
    block, forwards, _ = enter(make_model("llama"), 300)
    before, threads = resident_bytes(), set(threading.enumerate())  # of which some may be about to end
    with Lockstep(block, forwards, torch.device("cpu")) as steps:
        for i in range(300):
            assert steps.run(i) is None
        held = resident_bytes() - before
        assert set(threading.enumerate()) <= threads
    assert held < paused_bytes(300, "cpu")


def enter(model, count: int = 3):
    blocks = find_blocks(model)
    calls = list(capture_calls(model, blocks, [{"input_ids": make_tokens(2, 8, seed=i)} for i in range(count)]))
    return blocks[0], [lambda c=call: run_block(blocks[0], c.hidden, c.others[0]) for call in calls], calls


def test_each_stops_until_it_may_pass():
    block, forwards, _ = enter(make_model("llama"))
    with torch.no_grad():
        expected = [forward() for forward in forwards]
    with Lockstep(block, forwards, torch.device("cpu")) as steps:
        for i in range(3):
            assert steps.run(i) is None
            child, x = steps.stop_of(i)
            assert child == "self_attn.q_proj"
            steps.admit(i, ["self_attn.q_proj", "self_attn.k_proj"], x)
        assert steps.run(1) is None
        assert steps.stop_of(1)[0] == "self_attn.v_proj"
        assert steps.run(1) is None, "it was not admitted"
        assert steps.stop_of(0)[0] == "self_attn.q_proj"
        while (stop := steps.stop_of(1)) is not None:
            steps.admit(1, stop[:1], stop[1])
            output = steps.run(1)
        assert torch.equal(output, expected[1])
        assert not output.requires_grad
    assert not any(linear._forward_pre_hooks for linear in block.linears.values())


def test_errors_come_through_and_end_all():
    block, forwards, _ = enter(make_model("llama"))

    def broken(*_):
        raise InputError("a real error")

    ended = []
    forwards[0] = ending(forwards[0], ended)
    with Lockstep(block, forwards, torch.device("cpu")) as steps:
        steps.run(0)
        steps.run(1)
        block.linears["self_attn.k_proj"].forward = broken
        child, x = steps.stop_of(1)
        steps.admit(1, [child, "self_attn.k_proj"], x)
        with pytest.raises(InputError, match="a real error"):
            steps.run(1)
        assert not ended
    assert ended


def ending(forward, ended):
    """A forward that notes when it ends, by an error too."""

    def compute():
        try:
            return forward()
        finally:
            ended.append(None)

    return compute


def test_settings_are_taken_along():
    """Under autocast the forwards compute in its dtype too."""
    block, _forwards, calls = enter(make_model("llama"), 2)
    seen = []

    def note(_module, _args, output):
        seen.append((output.dtype, torch.is_grad_enabled()))

    block.module.mlp.down_proj.register_forward_hook(note)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert keeps_no_state(block, 0, calls, [call.hidden for call in calls])
    assert seen == [(torch.bfloat16, False)] * 4


class Modal(nn.Module):
    """Computes in modes of its own."""

    def __init__(self, mlp: nn.Module, modes) -> None:
        super().__init__()
        self.mlp, self.modes = mlp, modes

    def forward(self, x):
        with contextlib.ExitStack() as stack:
            for mode in self.modes():
                stack.enter_context(mode)
            return self.mlp(x).clone()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is functional.silu else found


MODES = {
    "autocast": lambda: [torch.autocast("cpu", torch.bfloat16)],
    "inference": lambda: [torch.inference_mode()],
    "gradients": lambda: [torch.enable_grad()],
    "functions": lambda: [Doubling()],
    "dispatch": lambda: [FlopCounterMode(display=False), Reads()],
    "all": lambda: [torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), Doubling(), Reads()],
}


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_torch_shows_warnings_as_before(family):
    """A forward that stops inside a call of torch leaves that call's handler of warnings on its own stack. In use
    afterwards, it ended the process at the next warning of C++ code."""
    before = compiled().warning_handler()
    prune_model(make_model(family), make_tokens(8, 16), PruneConfig("collect(batch_tokens=32) + wanda"))
    assert compiled().warning_handler() == before


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
def test_modes_of_a_forward_stay_in_it(modes, family, monkeypatch):
    """Each forward stops in its modes, and what runs meanwhile, other forwards too, is not in them."""
    here, seen, models = TorchState.now(torch.device("cpu")), [], [make_model(family) for _ in range(2)]
    for model in models:
        for layer in model.model.layers:
            layer.mlp = Modal(layer.mlp, modes)
    real = in_lockstep.observe

    def observe(*arguments):
        seen.append(TorchState.now(torch.device("cpu")))
        real(*arguments)

    monkeypatch.setattr(in_lockstep, "observe", observe)
    (reports, context), (expected, _) = pruned(models[0], True), pruned(models[1], False)
    assert set(context.stateless.values()) == {True}
    assert TorchState.now(torch.device("cpu")) == here
    assert {(s.inference, s.gradients, s.autocast[0][1], s.function_modes, s.dispatch_modes) for s in seen} == {
        (False, False, False, (), ())
    }
    assert reports == expected
    assert_same(*models)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_taken_apart_as_they_are_called(family):
    block = find_blocks(make_model(family))[0]
    gates, downs = block.expert_steps()
    steps = in_lockstep.one_by_one(block, [["a", "b"], gates, downs, ["c"]])
    pairs = [[child] for pair in zip(gates, downs, strict=True) for child in pair]
    assert steps == [["a", "b"], *pairs, ["c"]]


def test_a_linear_that_a_batch_calls_twice_is_an_error():
    """The first batch calls it once, so only lockstep can tell."""
    model = make_model("llama")
    mlp = model.model.layers[0].mlp
    own, calls = mlp.forward, []

    def forward(x):
        calls.append(None)
        again = own(x) if len(calls) > 11 else 0
        return own(x) + again

    mlp.forward = forward
    message = (
        r"layers\.0\.mlp\.gate_proj is called twice in its block, or in another order .*write collect\(order=block\)"
    )
    with pytest.raises(InputError, match=message):
        pruned(model, True)
