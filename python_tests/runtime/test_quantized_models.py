"""Packed folders of quantized models: the products, states and texts of the dense model."""

import copy
import json
import pickle

import pytest
import torch
from folders import prune, save_dense
from helpers import assert_same_bits, rest_nightly
from quantized_folders import on_grid, quantize_folder
from runtime.test_packed_models import dense_model, flip_a_bit, packed_linears
from tiny_models import make_tokens
from torch import nn
from transformers import AutoModelForCausalLM

import ace_ext
from ace_ext import InputError, load_packed
from ace_ext.cli.main import main
from ace_ext.grids import Grid
from ace_ext.packed.packing import pack
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.runtime import PackedLinear, QuantizedLinear

ace_ext.register()
GRIDS = (Grid(8, 64), Grid(4, 128), Grid(3, 64))
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}bit")


def make_folders(folder, family="llama", grid=GRIDS[1], dtype=torch.float32, codec="bitmap", **config):
    """A dense folder whose pruned matrices are on the grid, and the packed one."""
    dense = save_dense(folder / "dense", family, dtype)
    text = {"source": "tokens"}
    prune(dense, folder / "pruned", calibration=text, method="magnitude", pattern="2:4", **config)
    quantized = quantize_folder(folder / "pruned", folder / "quantized", grid)
    pack(quantized, folder / "packed", codec, (2, 4), grid)
    return quantized, folder / "packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("llama"))


def quantized_linears(model) -> list[QuantizedLinear]:
    return [module for module in packed_linears(model) if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "opt", "gemma3", "mixtral", "granite-moe"])
def test_models_of_every_kind(family, tmp_path):
    dense_folder, packed = make_folders(tmp_path, family, GRIDS[0])
    dense, tokens = dense_model(dense_folder), make_tokens(2, 16)
    for model in (load_packed(packed), AutoModelForCausalLM.from_pretrained(packed)):
        assert len(quantized_linears(model)) == len(packed_linears(model)) >= 9
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
        expected, found = dense.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_same_bits(found[name], tensor)
        model.save_pretrained(tmp_path / "saved")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "saved" / file).read_bytes() == (dense_folder / file).read_bytes()
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))


@grids
@pytest.mark.parametrize("codec", rest_nightly(["bitmap"], ["bitmap", "nm", "archive"]))
def test_every_format_width_and_dtype(codec, grid, dtype, tmp_path):
    dense_folder, packed = make_folders(tmp_path, grid=grid, dtype=dtype, codec=codec)
    dense, model = dense_model(dense_folder), load_packed(packed)
    assert len(quantized_linears(model)) == 21
    assert {linear.bits for linear in quantized_linears(model)} == {8 if grid.bits == 8 else 4}
    assert model.dtype == dtype
    for name, tensor in dense.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor)


def linear_of(random, grid=GRIDS[1], dtype=torch.float32, rows=24, cols=200) -> tuple[QuantizedLinear, torch.Tensor]:
    weight = torch.randn(rows, cols, generator=random) * (torch.rand(rows, cols, generator=random) < 0.5)
    weight = on_grid(weight.to(dtype), grid)
    bias = torch.randn(rows, generator=random).to(dtype)
    return QuantizedLinear(QuantizedMatrix.of(weight, grid).check(), bias), weight


@grids
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_inputs_of_any_strides(tokens, grid, dtype, random):
    linear, _ = linear_of(random, grid, dtype)
    x = torch.randn(2, tokens, 200, generator=random).to(dtype)
    views = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second": x.repeat_interleave(2, -1)[..., ::2],
        "expanded": x[:1, :1].expand_as(x),
        "slice": torch.cat([x, x], -1)[..., 200:],
        "one token": x[:, -1],
        "vector": x[0, 0],
        "nothing": x[:0],
    }
    for view in views.values():
        torch.testing.assert_close(linear(view), linear(view.clone(memory_format=torch.contiguous_format)))


@grids
def test_moves_casts_copies_and_new_weights(grid, random):
    linear, weight = linear_of(random, grid)
    x = torch.randn(3, 200, generator=random)
    assert_same_bits(linear.weight, weight)
    assert f"bits={linear.bits}, group={grid.group}" in repr(linear)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert_same_bits(other(x), linear(x))
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert_same_bits(half.weight, linear.matrix.to(torch.bfloat16).dense())
    assert half(x.bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(linear).to("meta")
    assert meta(x.to("meta")).shape == (3, 24)
    doubled = {"weight": weight * 2, "bias": torch.ones(24)}
    linear.load_state_dict(doubled)
    assert_same_bits(linear.weight, weight * 2)
    torch.testing.assert_close(linear(x), x @ (weight * 2).T + 1)
    for bad, words in (
        (weight.T, r"weight must be \[24, 200\]"),
        (weight.double(), "must be float32, float16 or bfloat16"),
        (torch.randn(24, 200, generator=random), r"must be on the grid of QuantizedLinear\("),
    ):
        with pytest.raises(RuntimeError, match=words):
            linear.load_state_dict({"weight": bad, "bias": torch.ones(24)})
    assert_same_bits(linear.weight, weight * 2)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_as_of_a_linear(tokens, narrow, random):
    """Scales are rounded, not weights, so an output may differ by two roundings: of the dense weight and of a scale."""
    packed, weight = linear_of(random)
    dense = nn.Linear(200, 24)
    dense.load_state_dict({"weight": weight, "bias": packed.bias})
    bound = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[narrow]
    x = torch.randn(tokens, 200, generator=random).requires_grad_()
    with torch.autocast("cpu", narrow):
        found, expected = packed(x), dense(x)
    assert found.dtype == expected.dtype == narrow
    sizes = (x.abs() @ weight.abs().T + packed.bias.abs()).detach()
    assert ((found - expected).abs().float() <= 4 * bound * sizes).all()
    found.float().square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_torch_compile_takes_a_quantized_linear(random):
    linear, _ = linear_of(random)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for tokens in (1, 4):
        x = torch.randn(2, tokens, 200, generator=random)
        torch.testing.assert_close(compiled(x), linear(x))


def test_a_compiled_model_and_gradients(llama):
    dense_folder, packed = llama
    dense, model, tokens = dense_model(dense_folder), load_packed(packed), make_tokens(2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    gradients = []
    for one in (dense, model):
        embedded = one.get_input_embeddings()(tokens).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@grids
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_asked_for(grid, stored, tmp_path):
    """Scales are converted, and codes stay: weights are those of the converted scales."""
    _, packed = make_folders(tmp_path, "llama-tied", grid, stored)
    asked = torch.bfloat16 if stored == torch.float32 else torch.float32
    own, model = load_packed(packed), AutoModelForCausalLM.from_pretrained(packed, dtype=asked)
    assert {p.dtype for p in (*model.parameters(), *(m.scales for m in quantized_linears(model)))} == {asked}
    for one, other in zip(quantized_linears(own), quantized_linears(model), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert_same_bits(other.weight, one.matrix.to(asked).dense())
    with torch.no_grad():
        logits = [one(make_tokens(1, 7)).logits.float() for one in (own, model)]
    assert (logits[0] - logits[1]).abs().max() < 2.0**-4 * logits[0].abs().max()


def test_eval_verify_and_bench_take_quantized_folders(llama, capsys, monkeypatch):
    dense, packed = llama
    results = []
    for folder in (dense, packed):
        text = str(dense.parent / "text.txt")
        assert main(["eval", "--model", str(folder), "--text", text, "--seqlen", "16", "--json", "--quiet"]) == 0
        results.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert results[1] == pytest.approx(results[0], abs=5e-4)
    assert main(["verify", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loads"]
    monkeypatch.setattr("ace_ext.bench.pair._in_a_process", lambda _: (1.0, 1.0))  # loads; test_pair.py has them
    few = ["--tokens", "2", "--rounds", "1", "--prefill", "8"]
    assert main(["bench", str(packed), "--dense", str(dense), *few, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"]["ratio"] > 1
    assert found["logits"]["largest"] < 1e-4


@pytest.mark.parametrize(
    ("codec", "place"),
    [("bitmap", "codes"), ("bitmap", "scales"), ("nm", "codes"), ("nm", "scales"), ("nm", "indices")],
)
def test_loading_checks_values_on_request(codec, place, tmp_path):
    _, packed = make_folders(tmp_path, codec=codec)
    load_packed(packed, verify=True)
    flip_a_bit(packed, place)
    with pytest.raises(InputError, match="does not restore the file that was packed"):
        load_packed(packed, verify=True)


@pytest.mark.parametrize("place", ["codes", "scales1", "bitmap"])
def test_loading_an_archive_checks_values_always(place, tmp_path):
    _, packed = make_folders(tmp_path, codec="archive")
    flip_a_bit(packed, place)
    with pytest.raises(InputError, match="is damaged"):
        load_packed(packed)


def test_linears_with_values_and_with_codes_stand_side_by_side(tmp_path):
    """Matrices that are not on the grid, because they were changed later, keep their values."""
    from ace_ext.models.safetensors_files import Shards

    dense, _ = make_folders(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    shards = Shards(dense)
    shards.write({name: shards.read(name) * torch.rand(48, 1)})
    shards.write({name: torch.where(shards.read(name) == 0, 0.0, shards.read(name) + torch.rand(48, 32))})
    pack(dense, tmp_path / "mixed", "bitmap", grid=GRIDS[1])
    model, expected = load_packed(tmp_path / "mixed"), dense_model(dense)
    assert len(packed_linears(model)) == len(quantized_linears(model)) + 1 == 21
    assert type(model.model.layers[1].mlp.up_proj) is PackedLinear
    for key, tensor in expected.state_dict().items():
        assert_same_bits(model.state_dict()[key], tensor)
