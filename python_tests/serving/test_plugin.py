"""The plug-in's classes with vLLM's base classes replaced by empty ones: what they do between loading and products.

:mod:`serving.test_vllm` runs them in vLLM.
"""

import ast
import importlib
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from folders import prune, save_dense, spawn
from helpers import assert_same_bits
from quantized_folders import quantize_folder
from serving.test_experts import silu_and_up
from serving.test_loading import load_merged, stored
from serving.test_matrices import make
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

import ace_ext
from ace_ext import InputError
from ace_ext.grids import Grid
from ace_ext.packed.packing import pack
from ace_ext.serving.product import PackedProduct
from ace_ext.serving.slots import Slot

SOURCES = Path(ace_ext.__file__).parent
LAYERS = "vllm.model_executor.layers"


class Base:
    """A base class that does nothing."""

    enable_weights_track = None

    def __init__(self, *given):
        self.moe = given[0] if given else None

    def get_all_weights(self, model_config, model):
        yield "other", torch.zeros(1)

    def load_weights(self, model, model_config):
        model.update(self.get_all_weights(model_config, model))
        if self.enable_weights_track and "lacks" in model:
            raise ValueError(f"not initialized from checkpoint: {model['lacks']}")

    def download_model(self, model_config):
        raise RuntimeError("fetched")


class Model(dict):
    """The tensors that a loader gives, and the modules of a model."""

    def __init__(self, *modules, **tensors):
        super().__init__(tensors)
        self.modules = lambda: modules


class Dense:
    """vLLM's dense methods: notes the layer, and multiplies."""

    def process_weights_after_loading(self, layer):
        layer.prepared = True

    def apply(self, layer, x, bias):
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer, tokens):
        return functional.embedding(tokens, layer.weight)


class Layer(nn.Module):
    prefix = "layers.0.qkv_proj"


def set_attributes(weight, attributes):
    for name, value in attributes.items():
        setattr(weight, name, value)


def activate(activation, out, x, activation_config):
    assert activation.value == "silu"  # vLLM has no kernel of other ones for CPUs
    return out.copy_(silu_and_up(x))


class Formula:
    """An activation of vLLM that has a formula, and no kernel for CPUs."""

    def forward_native(self, x):
        return x[:, ::2] * x[:, 1::2]


@pytest.fixture
def plugin(monkeypatch):
    """The module, imported with replacements of what it needs of vLLM."""
    registered = {}
    names = {
        f"{LAYERS}.fused_moe": {"FusedMoEMethodBase": Base, "RoutedExperts": type("RoutedExperts", (Layer,), {})},
        f"{LAYERS}.activation": {"SwigluOAIAndMul": Formula},
        f"{LAYERS}.fused_moe.activation": {
            "ApplyMoEActivationConfig": SimpleNamespace(from_configs=lambda moe, quant: None),
            "apply_moe_activation": activate,
        },
        f"{LAYERS}.fused_moe.config": {"FusedMoEQuantConfig": SimpleNamespace(make=lambda **given: given)},
        f"{LAYERS}.linear": {
            "LinearBase": type("LinearBase", (Layer,), {}),
            "LinearMethodBase": Base,
            "UnquantizedLinearMethod": Dense,
        },
        f"{LAYERS}.quantization": {
            "register_quantization_config": lambda name: lambda config: registered.update({name: config})
        },
        f"{LAYERS}.quantization.base_config": {"QuantizationConfig": Base},
        f"{LAYERS}.vocab_parallel_embedding": {
            "VocabParallelEmbedding": type("VocabParallelEmbedding", (Layer,), {}),
            "UnquantizedEmbeddingMethod": Dense,
        },
        "vllm.model_executor.model_loader": {
            "_LOAD_FORMAT_TO_MODEL_LOADER": {name: Base for name in ("auto", "hf", "safetensors", "dummy")}
        },
        "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": Base},
        "vllm.model_executor.utils": {"set_weight_attrs": set_attributes},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("vllm", "vllm.model_executor", LAYERS):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "ace_ext.serving.vllm_plugin", raising=False)
    module = importlib.import_module("ace_ext.serving.vllm_plugin")
    module.registered = registered
    yield module
    sys.modules.pop("ace_ext.serving.vllm_plugin", None)


@pytest.fixture
def packed(tmp_path):
    source = save_dense(tmp_path / "dense", "llama", torch.float32)
    prune(source, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(tmp_path / "pruned", tmp_path / "packed", "bitmap")
    return tmp_path / "packed"


def test_the_entry_point_names_it():
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "ace_ext")
    assert found.value == "ace_ext.serving.vllm_plugin:register"
    text = (SOURCES / "serving" / "vllm_plugin.py").read_text()
    assert "register" in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_only_the_plugin_and_its_engine_of_bench_import_vllm():
    importing = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vllm" for alias in node.names))
    }
    assert importing == {"serving/vllm_plugin.py", "bench/_vllm_engine.py"}


def test_a_second_registration_changes_nothing(plugin):
    plugin.register()
    plugin.register()
    assert plugin.registered == {"ace_ext": plugin.PackedConfig}
    assert {name: loader is plugin.PackedLoader for name, loader in plugin.LOADERS.items()} == {
        "auto": True,
        "hf": True,
        "safetensors": True,
        "dummy": False,
    }


def linear(plugin, rows=80, cols=200):
    """A merged layer that is not loaded yet, and its method."""
    layer, method = Layer(), plugin.PackedMethod(Dense())
    method.create_weights(layer, cols, [rows // 2, rows // 4, rows // 4], cols, rows, torch.float32, weight_loader=1)
    assert (layer.weight.output_dim, layer.weight.input_dim, layer.weight.weight_loader) == (0, 1, 1)
    return layer, method


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer(plugin, bias, random):
    layer, method = linear(plugin)
    weights = [make("even", shape=(40, 200)), make("ragged", shape=(20, 200)), make("even", shape=(20, 200))]
    load_merged(layer.weight, [stored(weight) for weight in weights], 0)
    method.process_weights_after_loading(layer)
    assert isinstance(layer.product, PackedProduct)
    assert layer.weight.numel() == 0
    x, shift = torch.randn(3, 200, generator=random), torch.randn(80, generator=random) if bias else None
    expected = functional.linear(x, torch.cat(weights), shift)
    torch.testing.assert_close(method.apply(layer, x, shift), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_layer_is_vllms(plugin, random):
    layer, method = linear(plugin)
    weight = torch.randn(80, 200, generator=random)
    layer.weight.data.copy_(weight)
    method.process_weights_after_loading(layer)
    assert layer.prepared
    assert not isinstance(layer.weight, Slot)
    x = torch.randn(3, 200, generator=random)
    assert_same_bits(method.apply(layer, x), functional.linear(x, weight))


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_head_that_is_tied_to_the_embedding(plugin, is_packed, head_first, random):
    """vLLM ties the head before it loads the weight, and then prepares layers in the order of the model."""
    (embedding, method), (head, other) = linear(plugin), linear(plugin)
    assert other.tie_weights(head, embedding) is head
    weight = make("even", shape=(80, 200)) if is_packed else torch.randn(80, 200, generator=random)
    embedding.weight.data.copy_(stored(weight) if is_packed else weight)
    steps = [(method, embedding), (other, head)]
    for each, layer in reversed(steps) if head_first else steps:
        each.process_weights_after_loading(layer)
    assert isinstance(head.product, PackedProduct) == is_packed
    assert head.product is embedding.product
    assert head.weight is embedding.weight
    assert getattr(head, "prepared", False) == (not is_packed)
    assert "tied_to" not in dict(head.named_modules())
    tokens, x = torch.tensor([79, 0, 3]), torch.randn(3, 200, generator=random)
    assert_same_bits(method.embedding(embedding, tokens), weight[tokens])
    torch.testing.assert_close(other.apply(head, x), functional.linear(x, weight))


def test_a_head_that_is_tied_to_an_embedding_of_another_kind(plugin, random):
    head, method = linear(plugin)
    other = SimpleNamespace(weight=nn.Parameter(torch.randn(80, 200, generator=random)), _modules={})
    method.process_weights_after_loading(method.tie_weights(head, other))
    x = torch.randn(3, 200, generator=random)
    assert head.prepared
    assert_same_bits(method.apply(head, x), functional.linear(x, other.weight))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("activation", "formula"), [("silu", silu_and_up), ("swigluoai", Formula().forward_native)])
def test_experts(plugin, rank, activation, formula, random):
    up, down = make("even", shape=(80, 64)).view(2, 40, 64), make("even", shape=(128, 20)).view(2, 64, 20)
    method = plugin.PackedExpertsMethod(SimpleNamespace(is_act_and_mul=True, has_bias=True, tp_rank=rank))
    layer = Layer()
    method.create_weights(layer, 2, 64, 20, torch.float32, weight_loader=1)
    layer.w13_weight.data.copy_(stored(up))
    layer.w2_weight.data.copy_(stored(down))
    layer.w13_bias.data.copy_(torch.randn(2, 40, generator=random))
    layer.w2_bias.data.copy_(torch.randn(2, 64, generator=random))
    layer.activation = SimpleNamespace(is_gated=True, value=activation)
    layer.apply_router_weight_on_input, layer.expert_map = False, None
    layer.swiglu_alpha = layer.swiglu_beta = layer.swiglu_limit = None
    layer.layer_name = "layers.0.experts"
    method.process_weights_after_loading(layer)
    assert layer.w13_weight.numel() == layer.w2_weight.numel() == 0
    x, share = torch.randn(5, 64, generator=random), torch.rand(5, 1, generator=random)
    found = method.apply(layer, x, share, torch.ones(5, 1, dtype=torch.int32), None, None)
    shift = layer.w2_bias[1] if rank == 0 else None
    inner = formula(functional.linear(x, up[1], layer.w13_bias[1]))
    torch.testing.assert_close(found, share * functional.linear(inner, down[1], shift), rtol=1e-4, atol=1e-4)


def test_which_layers_are_packed(plugin):
    config = plugin.PackedConfig.from_config({"quant_method": "ace_ext"})
    assert config.get_name() == "ace_ext"
    routed = plugin.RoutedExperts()
    routed.moe_config = SimpleNamespace()
    found = [
        config.get_quant_method(layer, "")
        for layer in (plugin.LinearBase(), plugin.VocabParallelEmbedding(), routed, nn.Embedding(2, 2))
    ]
    assert [type(one).__name__ for one in found] == ["PackedMethod", "PackedMethod", "PackedExpertsMethod", "NoneType"]


def test_the_loader_reads_packed_folders_and_leaves_others_alone(plugin, packed):
    loader = plugin.PackedLoader()
    found = dict(loader.get_all_weights(SimpleNamespace(quantization="ace_ext", model=str(packed)), Model()))
    assert "model.layers.0.mlp.down_proj.weight" in found
    loader.download_model(SimpleNamespace(model=str(packed)))
    other = SimpleNamespace(quantization=None, model="other")
    assert list(dict(loader.get_all_weights(other, None))) == ["other"]
    with pytest.raises(RuntimeError, match="fetched"):
        loader.download_model(other)


def test_other_files_are_another_model_to_vllms_compile_cache(plugin, packed, tmp_path):
    """vLLM hashes the configuration; the second folder has the first one's name and configuration."""
    notes = []
    for grid in (None, Grid(8, 64), Grid(4, 64)):
        if grid is not None:
            shutil.rmtree(packed)
            pack(quantize_folder(tmp_path / "pruned", tmp_path / f"{grid.bits}", grid), packed, "bitmap", grid=grid)
        configs = [SimpleNamespace(quantization="ace_ext", model=str(packed), hf_config=LlamaConfig()) for _ in "ab"]
        for config in configs:
            model = Model()
            plugin.PackedLoader().load_weights(model, config)
            assert "model.layers.0.mlp.down_proj.weight" in model
        assert configs[0].hf_config.to_json_string() == configs[1].hf_config.to_json_string()
        notes.append(configs[0].hf_config.to_json_string())
    assert len({LlamaConfig().to_json_string(), *notes}) == 4
    other = SimpleNamespace(quantization=None, model="other", hf_config=LlamaConfig())
    plugin.PackedLoader().load_weights({}, other)
    assert other.hf_config.to_json_string() == LlamaConfig().to_json_string()


def test_a_packed_folder_whose_configuration_does_not_say_so(plugin, packed):
    config = SimpleNamespace(quantization=None, model=str(packed), hf_config=LlamaConfig())
    with pytest.raises(InputError, match=r"packed is packed, but its quantization is None by .* must be .ace_ext."):
        plugin.PackedLoader().load_weights(Model(), config)


def test_a_parameter_that_the_files_lack(plugin, packed, monkeypatch, capsys):
    """vLLM looks for such parameters only if it is told to, where there is a quantization."""
    config = SimpleNamespace(quantization="ace_ext", model=str(packed), hf_config=LlamaConfig())
    with pytest.raises(
        InputError, match=r"packed does not fit its config\.json; pack the model again \(not init.*: bias"
    ):
        plugin.PackedLoader().load_weights(Model(lacks="bias"), config)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit):
        plugin.PackedLoader().load_weights(Model(lacks="bias"), config)
    assert "does not fit its config.json" in capsys.readouterr().err
    loader = plugin.PackedLoader()
    loader.enable_weights_track = False  # as the user asked
    loader.load_weights(Model(lacks="bias"), config)


@pytest.mark.parametrize("held", ["product", "mixture"])
def test_weights_are_not_loaded_again(plugin, packed, held):
    config = SimpleNamespace(quantization="ace_ext", model=str(packed))
    with pytest.raises(InputError, match="cannot be loaded again while it is served"):
        plugin.PackedLoader().get_all_weights(config, Model(nn.Module(), SimpleNamespace(**{held: None})))


def test_files_that_change_while_the_engine_starts_are_one_line(plugin, packed, monkeypatch, capsys):
    (file,) = packed.glob("*.packed.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    config = SimpleNamespace(quantization="ace_ext", model=str(packed), hf_config=LlamaConfig())
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        plugin.PackedLoader().load_weights(Model(), config)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    with pytest.raises(SystemExit):
        plugin.PackedLoader().load_weights(Model(), config)
    assert capsys.readouterr().err.startswith(f"ace_ext: {file} is not a complete")


def test_a_damaged_folder(plugin, packed, monkeypatch, capsys):
    plugin.PackedConfig().maybe_update_config(str(packed))
    (file,) = packed.glob("*.packed.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    plugin._check.cache_clear()
    with pytest.raises(InputError, match="is not a complete safetensors file"):  # in a program of one's own
        plugin.PackedConfig().maybe_update_config(str(packed))
    server = SimpleNamespace(__spec__=SimpleNamespace(name="vllm.entrypoints.openai.api_server"))
    for patch in (
        lambda own: own.setattr(sys, "argv", ["/usr/bin/vllm", "serve"]),
        lambda own: own.setitem(sys.modules, "__main__", server),  # python -m
    ):
        with monkeypatch.context() as own:
            patch(own)
            with pytest.raises(SystemExit) as stopped:
                plugin.PackedConfig().maybe_update_config(str(packed))
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"ace_ext: {file} is not a complete")


def test_a_layer_without_weights_is_named(plugin):
    layer, method = linear(plugin)
    with pytest.raises(InputError, match=r"layers\.0\.qkv_proj\.weight is \[80, 200\]"):
        method.process_weights_after_loading(layer)


def test_importing_the_package_does_not_import_vllm():
    modules = "ace_ext, ace_ext.serving.slots, ace_ext.serving.experts"
    code = f"import {modules}, sys; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    assert spawn([sys.executable, "-c", code]).wait() == 0
