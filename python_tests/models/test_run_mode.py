"""The caller's modes change no result: autocast, inference mode, default dtype, training flags, compiled modules."""

import contextlib
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import rest_nightly
from tiny_models import make_model, make_tokens
from torch import nn

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.healing import HealSettings, distill_

TRAINED = {"train": "wanda + train(epochs=1)", "distill": "admm + distill(tokens=512)"}


def pruned(model: nn.Module, config: PruneConfig):
    return [vars(matrix) for matrix in prune_model(model, make_tokens(12, 32), config).matrices]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("batch_tokens", [128, 10_000])
@pytest.mark.parametrize("method", ["published-wanda", "fast"])
def test_autocast(method, batch_tokens):
    config = PruneConfig(f"{method}(batch_tokens={batch_tokens})")
    plain, model = make_model("llama"), make_model("llama")
    expected = pruned(plain, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert pruned(model, config) == expected
        assert torch.is_autocast_enabled("cpu")
    assert_same(model, plain)


def test_autocast_reads_the_pruned_weights_afterwards():
    model, tokens = make_model("llama").requires_grad_(True), make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
        prune_model(model, tokens)
        found = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens).logits, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_no_graph_is_recorded(mode):
    model, seen = make_model("llama").requires_grad_(True), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *a: seen.append(a[2].requires_grad))
    with mode():
        prune_model(model, make_tokens())
    handle.remove()
    assert seen
    assert not any(seen)


def test_distillation_under_autocast():
    dense, tokens, students = make_model("llama"), make_tokens(6, 32), []
    for mode in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        students.append(make_model("llama"))
        prune_model(students[-1], tokens)
        with mode:
            distill_(students[-1], dense, tokens, HealSettings(step_tokens=64))
    assert_same(*students)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        PruneConfig("fast"),
        PruneConfig("balanced"),
        PruneConfig("cosp"),
        PruneConfig("ace"),
        PruneConfig("mean-update"),
    ],
    ids=["fast", "balanced", "cosp", "ace", "mean"],
)
def test_default_dtype(config, dtype):
    plain, model = make_model("llama", torch.bfloat16), make_model("llama", torch.bfloat16)
    expected = pruned(plain, config)
    with default_dtype(dtype):
        assert pruned(model, config) == expected
    assert_same(model, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trainer", TRAINED)
def test_training_with_another_default_dtype(trainer, dtype):
    model = make_model("llama")
    with default_dtype(dtype):
        pruned(model, PruneConfig(TRAINED[trainer]))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("more", [{}, {"sparsity": 0.5}, {"method": "distill(tokens=64)"}], ids=str)
def test_flags_after_a_removal(more):
    """Its modules are new ones."""
    model = make_model("llama").train()
    model.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    prune_model(model, make_tokens(12, 32), remove="neurons=0.25", **more)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_flags_of_single_modules():
    model = make_model("llama").train()
    model.model.layers[1].mlp.eval()
    before = {name: module.training for name, module in model.named_modules()}
    prune_model(model, make_tokens())
    assert {name: module.training for name, module in model.named_modules()} == before
    distill_(model, make_model("llama"), make_tokens(6, 32), HealSettings(step_tokens=64))
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("trainer", TRAINED)
def test_training_in_inference_mode(trainer):
    config = PruneConfig(TRAINED[trainer])
    plain, model = make_model("llama"), make_model("llama")
    pruned(plain, config)
    with torch.inference_mode():
        pruned(model, config)  # its tokens are made here too
        assert torch.is_inference_mode_enabled()
    assert_same(model, plain)


@pytest.mark.parametrize("trainer", TRAINED)
def test_weights_that_were_made_in_inference_mode_are_not_trained(trainer):
    with torch.inference_mode():
        model = make_model("llama")
        before = states(model)
    with pytest.raises(InputError, match=rf"{trainer} trains weights, .* \(got model\.embed_tokens\.weight"):
        pruned(model, PruneConfig(TRAINED[trainer]))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_weights_that_were_made_in_inference_mode_are_pruned_outside_it():
    plain = make_model("llama")
    with torch.inference_mode():
        model = make_model("llama")
    assert pruned(model, PruneConfig("fast")) == pruned(plain, PruneConfig("fast"))
    assert_same(model, plain)


def test_a_wrapped_model():
    model = make_model("llama")
    for call in (
        lambda: prune_model(nn.DataParallel(model), make_tokens()),
        lambda: distill_(nn.DataParallel(model), model, make_tokens()),
        lambda: distill_(model, nn.DataParallel(model), make_tokens()),
    ):
        with pytest.raises(InputError, match=r"model is wrapped in DataParallel; pass model\.module"):
            call()


@pytest.mark.parametrize("compiled", rest_nightly(["blocks"], ["blocks", "block lists", "model"]))
def test_compiled_modules(compiled):
    plain, model = make_model("llama"), make_model("llama")
    given = model
    if compiled == "blocks":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif compiled == "block lists":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    given(make_tokens(12, 32))  # is compiled now
    expected = pruned(plain, PruneConfig("fast"))
    found = pruned(given, PruneConfig("fast"))
    assert [{**matrix, "name": matrix["name"].replace("_orig_mod.", "")} for matrix in found] == expected
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(given(make_tokens()).logits, plain(make_tokens()).logits)


def test_other_systems_are_refused_when_the_package_is_imported():
    code = "import importlib.util, os, shutil; os.name = 'nt'; import ace_ext"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
    )
    assert "ImportError: ace_ext runs on Linux and macOS only" in done.stderr
