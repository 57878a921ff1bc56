"""Packed folders as models: logits, generation, saving, loading, gradients, the command line."""

import json

import pytest
import torch
from folders import prune, save_dense
from helpers import assert_same_bits
from tiny_models import RECURRENT, make_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, pipeline

from ace_ext import InputError, load_packed, ops, prune_model
from ace_ext.cli.main import main
from ace_ext.packed.files import SUFFIX
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.packing import pack
from ace_ext.runtime import PackedLinear, open_model

FAMILIES = ["llama", "llama-tied", "qwen2", "opt", "gemma3", "mixtral", "granite-moe", *RECURRENT]
CONFIGS = {
    "mamba": {"max_dense": 0.1},
    "falcon-mamba": {"max_dense": 0.1},
    "zamba": {"max_dense": 0.3, "skip": "layers.3.shared_transf"},  # whose matrices are those of layers.1
}


def make_folders(folder, family="llama", dtype=torch.float32, codec="bitmap", **config):
    dense = save_dense(folder / "dense", family, dtype)
    prune(
        dense,
        folder / "pruned",
        calibration={"source": "tokens"},
        method="magnitude",
        **{**CONFIGS.get(family, {}), **config},
    )
    keep_n, _, group_m = config.get("pattern", "").partition(":")
    pack(folder / "pruned", folder / "packed", codec, (int(keep_n), int(group_m)) if group_m else None)
    return folder / "pruned", folder / "packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("llama"))


def test_linears_that_share_a_weight_share_the_packed_one(tmp_path):
    _, packed = make_folders(tmp_path, "zamba")
    layers = load_packed(packed).model.layers
    first, second = (layers[i].shared_transf.self_attn.q_proj for i in (1, 3))
    assert isinstance(first, PackedLinear)
    assert first is second


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("settings", [{"sparsity": 0.7}, {"remove": "neurons=0.5"}], ids=str)
def test_a_packed_model_is_not_pruned(family, settings, tmp_path):
    """Of a mixture only the experts are ordinary weights in memory."""
    model = load_packed(make_folders(tmp_path, family)[1])
    with pytest.raises(InputError, match=r"^model\.layers\.0\.\S+ is packed; give the dense model \(ace-prune unpack"):
        prune_model(model, make_tokens(), **settings)


def dense_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def packed_linears(model) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


class Calls(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_head_is_not_copied_for_the_last_tokens_logits(rows, llama):
    """By the strides of a slice torch would choose a product that copies the transposed head."""
    model, tokens = load_packed(llama[1]), make_tokens(rows, 16)
    with torch.no_grad(), Calls() as calls:
        found = model(tokens, logits_to_keep=1).logits
        expected = model(tokens).logits
    assert "aten.bmm.default" not in calls.names
    torch.testing.assert_close(found, expected[:, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_kind(family, tmp_path):
    pruned, packed = make_folders(tmp_path, family)
    dense, model = dense_model(pruned), load_packed(packed)
    tokens = make_tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
        for some in (tokens[:1], tokens[:1, :3]):  # of one sequence, transposed inputs are views
            torch.testing.assert_close(model(some).logits, dense(some).logits, rtol=1e-4, atol=1e-5)
    assert len(packed_linears(model)) >= 9
    expected, found = dense.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
    model.save_pretrained(tmp_path / "saved")
    if family == "zamba":  # matrices that blocks share are saved with each of them
        for name, tensor in dense_model(tmp_path / "saved").state_dict().items():
            assert_same_bits(tensor, expected[name])
    else:
        assert (tmp_path / "saved/model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    assert type(model.get_output_embeddings()) is nn.Linear
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tokens", [3, 30])
def test_inputs_of_any_strides(tokens, dtype, random):
    """As nn.Linear: transposed, every second column, expanded, a slice, a vector, no token."""
    weight = torch.randn(6, 70, generator=random) * (torch.rand(6, 70, generator=random) < 0.5)
    linear = PackedLinear(PackedMatrix.of(weight.to(dtype)), torch.randn(6, generator=random).to(dtype))
    x = torch.randn(2, tokens, 70, generator=random).to(dtype)
    views = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second": x.repeat_interleave(2, -1)[..., ::2],
        "expanded": x[:1, :1].expand_as(x),
        "expanded batch": x[:1].expand_as(x),
        "expanded columns": x[..., :1].expand_as(x),
        "slice": torch.cat([x, x], -1)[..., 70:],
        "one token": x[:, -1],
        "vector": x[0, 0],
        "nothing": x[:0],
    }
    for view in views.values():
        torch.testing.assert_close(linear(view), linear(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_as_of_a_linear(tokens, wide, narrow, random):
    weight = (torch.randn(24, 70, generator=random) * (torch.rand(24, 70, generator=random) < 0.5)).to(wide)
    bias = torch.randn(24, generator=random).to(wide)
    packed, dense = PackedLinear(PackedMatrix.of(weight), bias), nn.Linear(70, 24, dtype=wide)
    dense.load_state_dict({"weight": weight, "bias": bias})
    bound = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[narrow]
    for dtype in (torch.float32, wide, narrow):  # of the input: autocast casts it, too
        x = torch.randn(tokens, 70, generator=random).to(dtype).requires_grad_()
        with torch.autocast("cpu", narrow):
            found, expected = packed(x), dense(x)
        assert found.dtype == expected.dtype == narrow
        torch.testing.assert_close(found.float(), expected.float(), rtol=2 * bound, atol=16 * bound)
        found.float().square().sum().backward()
        assert x.grad.dtype == dtype
        assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", narrow, enabled=False):
        assert packed(torch.ones(tokens, 70, dtype=wide)).dtype == wide


def test_a_packed_model_under_autocast(llama):
    pruned, packed = llama
    dense, model, tokens = dense_model(pruned), load_packed(packed), make_tokens(2, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = dense(tokens).logits, model(tokens).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    assert found.dtype == expected.dtype
    size = expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=2.0**-5 * size)
    torch.testing.assert_close(compiled.float(), found.float(), rtol=0, atol=2.0**-5 * size)


@pytest.mark.parametrize("tokens", [2, 40])
def test_the_op_keeps_its_dtype_under_autocast(tokens, random):
    matrix = PackedMatrix.of(torch.randn(24, 70, generator=random))
    x = torch.randn(tokens, 70, generator=random)
    expected = ops.packed_linear(x, matrix.bitmap, matrix.values)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(ops.packed_linear(x, matrix.bitmap, matrix.values), expected)


@pytest.mark.parametrize("codec", ["bitmap", "nm", "archive"])
def test_every_format_and_dtype(codec, dtype, tmp_path):
    pruned, packed = make_folders(tmp_path, dtype=dtype, codec=codec, pattern="2:4")
    dense, model = dense_model(pruned), load_packed(packed)
    assert len(packed_linears(model)) == 21
    assert model.dtype == dtype
    for linear in packed_linears(model):
        assert linear.row_start is None
        assert linear.values.shape[1] * 2 == linear.in_features
    for name, tensor in dense.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor)


def test_generation_and_pipelines(llama):
    pruned, packed = llama
    dense, model = dense_model(pruned), load_packed(packed)
    tokens = make_tokens(3, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    loaded = open_model(str(packed))
    text = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    assert text("the quick", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the quick")


def test_torch_compile_takes_a_packed_linear(random):
    weight = torch.randn(24, 70, generator=random) * (torch.rand(24, 70, generator=random) < 0.5)
    linear = PackedLinear(PackedMatrix.of(weight), torch.randn(24, generator=random))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for tokens in (1, 4):
        x = torch.randn(2, tokens, 70, generator=random)
        torch.testing.assert_close(compiled(x), linear(x))


def test_generating_with_a_static_cache_and_a_compiled_model(llama):
    """``generate`` with a static cache, and a compiled forward pass of a whole model without a graph break."""
    pruned, packed = llama
    dense, model = dense_model(pruned), load_packed(packed)
    tokens = make_tokens(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = dense.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


@pytest.mark.nightly
def test_inductor_compiles_a_packed_model(llama):
    _, packed = llama
    model, tokens = load_packed(packed), make_tokens(2, 5)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(torch.compile(model)(tokens, use_cache=False).logits, expected)


def test_moves_casts_and_new_weights(random):
    weight = torch.randn(6, 70, generator=random) * (torch.rand(6, 70, generator=random) < 0.5)
    linear = PackedLinear(PackedMatrix.of(weight), torch.zeros(6))
    x = torch.randn(3, 70, generator=random)
    assert_same_bits(linear.weight, weight)
    half = PackedLinear(PackedMatrix.of(weight), torch.zeros(6)).to(torch.bfloat16)
    assert_same_bits(half.weight, weight.bfloat16())
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert linear.to("meta")(x.to("meta")).shape == (3, 6)
    linear = PackedLinear(PackedMatrix.of(weight), torch.zeros(6))
    other = torch.randn(6, 70, generator=random)
    linear.load_state_dict({"weight": other, "bias": torch.ones(6)})
    assert_same_bits(linear.weight, other)
    torch.testing.assert_close(linear(x), x @ other.T + 1)
    with pytest.raises(RuntimeError, match=r"weight must be \[6, 70\]"):
        linear.load_state_dict({"weight": other.T, "bias": torch.ones(6)})
    with pytest.raises(RuntimeError, match=r"weight must be float32, float16 or bfloat16 \(got float64\)"):
        linear.load_state_dict({"weight": other.double(), "bias": torch.ones(6)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        linear.load_state_dict({"bias": torch.ones(6)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        linear.load_state_dict({"weight": other, "bias": torch.ones(6), "other": other})


def test_gradients_reach_the_input(llama):
    pruned, packed = llama
    dense, model = dense_model(pruned), load_packed(packed)
    gradients = []
    for one in (dense, model):
        embedded = one.get_input_embeddings()(make_tokens(1, 6)).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_weights_are_mapped(llama):
    """A write into a loaded weight does not change the file, and mapped tensors are aligned."""
    _, packed = llama
    (path,) = packed.glob(f"*{SUFFIX}")
    before = path.read_bytes()
    model = load_packed(packed)
    first, *_ = packed_linears(model)
    with open("/proc/self/maps") as maps:
        lines = [line.split()[0].split("-") for line in maps if str(path) in line]
    spans = [(int(start, 16), int(end, 16)) for start, end in lines]
    for linear in packed_linears(model):
        for tensor in (linear.bitmap, linear.values):
            assert any(start <= tensor.data_ptr() < end for start, end in spans)
            assert tensor.data_ptr() % 64 == 0
    first.values.fill_(1.0)
    assert path.read_bytes() == before


def test_eval_and_verify_take_packed_folders(llama, capsys):
    pruned, packed = llama
    results = []
    for folder in (pruned, packed):
        text = str(pruned.parent / "text.txt")
        assert main(["eval", "--model", str(folder), "--text", text, "--seqlen", "16", "--json", "--quiet"]) == 0
        results.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert results[1] == pytest.approx(results[0], abs=5e-4)
    assert main(["verify", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loads"]
    assert found["exact_rows"] == found["rows"] > 0


def flip_a_bit(packed, place):
    """Changes one bit of a stored matrix: of its values, or of what ``place`` names."""
    (path,) = packed.glob(f"*{SUFFIX}")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith(f"q_proj.weight.{place}"))
    begin, end = header[name]["data_offsets"]
    data[8 + length + (begin + end) // 2] ^= 1
    path.write_bytes(data)


def test_changed_values_are_found_by_verify(tmp_path, capsys):
    _, packed = make_folders(tmp_path)
    flip_a_bit(packed, "values")
    assert main(["verify", str(packed)]) == 2
    assert "does not restore the file" in capsys.readouterr().err


@pytest.mark.parametrize(("codec", "place"), [("bitmap", "values"), ("nm", "values"), ("nm", "indices")])
def test_loading_checks_values_on_request(codec, place, tmp_path):
    pruned, packed = make_folders(tmp_path, codec=codec, pattern="2:4")
    intact = load_packed(packed, verify=True)
    for name, tensor in dense_model(pruned).state_dict().items():
        assert_same_bits(intact.state_dict()[name], tensor)
    del intact
    flip_a_bit(packed, place)
    with pytest.raises(InputError, match="does not restore the file that was packed"):
        load_packed(packed, verify=True)


def test_loading_an_archive_checks_values_always(tmp_path):
    _, packed = make_folders(tmp_path, codec="archive")
    flip_a_bit(packed, "plane1")
    with pytest.raises(InputError, match="is damaged"):
        load_packed(packed)


def test_what_cannot_be_loaded_is_refused(llama, tmp_path, capsys):
    pruned, packed = llama
    with pytest.raises(InputError, match="holds no packed"):
        load_packed(pruned)
    assert main(["eval", "--model", str(packed), "--text", "x.txt", "--dtype", "float16"]) == 2
    assert "dtype must be auto for a packed folder" in capsys.readouterr().err
    config = json.loads((packed / "config.json").read_text())
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(InputError, match=r"gate_proj.weight is \[48, 32\] in the files, and \[40, 32\] by config.json"):
        load_packed(tmp_path)
    layers = config["num_hidden_layers"] - 1
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(
        InputError, match=rf"do not match its configuration \(not in the model: model.layers.{layers}\."
    ):
        load_packed(tmp_path)
