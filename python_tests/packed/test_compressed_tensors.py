"""Format ``compressed-tensors``: the layout, what other libraries load from it, and what it refuses."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from folders import prune, save_dense
from helpers import DTYPES, assert_same_bits, rest_nightly
from packed.test_packing import refused
from quantized_folders import on_grid, quantize_folder
from safetensors import safe_open
from tiny_models import make_tokens
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.formats import written_shards
from ace_ext.formats.compressed_tensors import CompressedWriter
from ace_ext.grids import Grid
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed._codec import Kept
from ace_ext.packed.compressed_tensors import CompressedShards, compress, is_compressed, size
from ace_ext.records import REPORT_NAME
from ace_ext.runs.output import read_report
from ace_ext.runtime import open_model

GRIDS = (Grid(8, 128), Grid(4, 64), Grid(3, 128))
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}bit")


def make_folders(folder: Path, grid: Grid, family: str = "llama", dtype=torch.bfloat16, **save) -> tuple[Path, Path]:
    """A dense folder of a quantized model, and the same in the format."""
    dense = save_dense(folder / "dense", family, dtype, **save)
    prune(dense, folder / "pruned", method="magnitude", calibration={"source": "tokens"})
    quantized = quantize_folder(folder / "pruned", folder / "quantized", grid)
    arguments = ["pack", str(quantized), "--output", str(folder / "standard"), "--format", "compressed-tensors"]
    assert main(arguments) == 0
    return quantized, folder / "standard"


def weight_by_the_layout(file, module: str, bits: int) -> torch.Tensor:
    """One number at a time: codes are unsigned with an offset, the lowest bits of a word first."""
    words, scales = file.get_tensor(f"{module}.weight_packed"), file.get_tensor(f"{module}.weight_scale")
    rows, cols = file.get_tensor(f"{module}.weight_shape").tolist()
    weight = torch.zeros(rows, cols, dtype=scales.dtype)
    for row in range(rows):
        raw = int.from_bytes(struct.pack(f"<{words.shape[1]}i", *words[row].tolist()), "little")
        for column in range(cols):
            code = (raw >> (bits * column) & (1 << bits) - 1) - (1 << (bits - 1))
            weight[row, column] = code * scales[row, column * scales.shape[1] // cols].float()
    return weight


@grids
@pytest.mark.parametrize("dtype", rest_nightly([torch.bfloat16], DTYPES))
def test_the_layout(grid, dtype, tmp_path):
    quantized, standard = make_folders(tmp_path, grid, dtype=dtype)
    dense, stored = Shards(quantized), 8 if grid.bits == 8 else 4
    config = json.loads((standard / "config.json").read_text())
    found = config.pop("quantization_config")
    assert config == json.loads((quantized / "config.json").read_text())
    (scheme,) = found.pop("config_groups").values()
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }
    weights = {"num_bits": stored, "type": "int", "symmetric": True, "dynamic": False}
    assert scheme["weights"] == {**weights, "strategy": "group", "group_size": 16}  # divides 32 and 48 columns
    with safe_open(standard / "model.safetensors", "pt") as file:
        names = set(file.keys())
        codes = {name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")}
        assert len(codes) == 21
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
            assert_same_bits(weight_by_the_layout(file, name, stored), dense.read(f"{name}.weight"))
        for name in dense.entries.keys() - {f"{module}.weight" for module in codes}:
            assert_same_bits(file.get_tensor(name), dense.read(name))
    assert len(names) == len(dense.entries) + 2 * 21


@grids
def test_it_is_read_like_the_dense_folder(grid, tmp_path):
    quantized, standard = make_folders(tmp_path, grid, "llama-tied", max_shard_size="20KB")
    dense, found = Shards(quantized), written_shards(standard)
    assert isinstance(found, CompressedShards)
    assert len(found.files) > 1
    assert found.entries.keys() == dense.entries.keys()
    for name in dense.entries:
        assert found.describe(name) == dense.describe(name)
        assert_same_bits(found.read(name), dense.read(name))
    index = json.loads((standard / "model.safetensors.index.json").read_text())
    assert "model.layers.0.self_attn.q_proj.weight_scale" in index["weight_map"]
    with pytest.raises(InputError, match="not changed in place"):
        found.write({})
    assert "codes of" in (standard / "README.md").read_text()


@grids
@pytest.mark.parametrize("dtype", rest_nightly([torch.bfloat16], DTYPES))
@pytest.mark.parametrize("family", rest_nightly(["llama", "opt"], ["llama", "qwen2", "gemma3", "opt"]))
def test_transformers_loads_the_dense_values(grid, family, dtype, tmp_path):
    """Both ways: compressed until the first call, and dense from the start."""
    from transformers import CompressedTensorsConfig

    quantized, standard = make_folders(tmp_path, grid, family, dtype)
    dense, tokens = AutoModelForCausalLM.from_pretrained(quantized, dtype="auto"), make_tokens(1, 8)
    options = {"max_new_tokens": 12, "do_sample": False}
    for given in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        model = AutoModelForCausalLM.from_pretrained(standard, dtype="auto", **given)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, dense(tokens).logits)
        assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))
        found = model.state_dict()
        for name, tensor in dense.state_dict().items():
            assert_same_bits(found[name], tensor)


@grids
def test_sizes_are_as_planned(grid, tmp_path):
    _, standard = make_folders(tmp_path, grid)
    with safe_open(standard / "model.safetensors", "pt") as file:
        module = "model.layers.0.mlp.gate_proj"
        parts = (file.get_tensor(f"{module}.weight_{part}") for part in ("packed", "scale", "shape"))
        found = sum(part.nbytes for part in parts)
    # 48 columns elsewhere divide the scales into groups of 16; of this matrix alone 32 would do
    assert size(Kept(48, 32, 0, torch.bfloat16, None, grid)) == found - 48 * 2
    assert size(Kept(256, 1024, 0, torch.bfloat16, None, Grid(4, 128))) == 256 * 1024 * (4 + 16 / 128) / 8 + 16


def test_a_run_that_writes_it_exchanges_the_folders(tmp_path):
    """The writer's last step; a second call, of a resumed run, does nothing."""
    quantized, standard = make_folders(tmp_path, GRIDS[1])
    folder = tmp_path / ".out.unfinished" / "model"
    shutil.copytree(quantized, folder)
    writer, report = CompressedWriter(folder), read_report(quantized)
    assert writer.rest([])
    writer.finish(report)
    assert is_compressed(folder)
    assert not is_compressed(folder.with_name("dense"))
    assert (folder / "model.safetensors").read_bytes() == (standard / "model.safetensors").read_bytes()
    again = CompressedWriter(folder)
    again.finish(report)
    again.check(None)
    assert again.rest([]) is None


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_verify_and_eval_open_it(family, tmp_path, capsys):
    """They read the dense values from the codes; the library is not needed."""
    quantized, standard = make_folders(tmp_path, GRIDS[1], family)
    dense, opened = (open_model(str(folder)).model for folder in (quantized, standard))
    state = opened.state_dict()
    assert state.keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert_same_bits(state[name], value)
    assert opened.config.to_dict().get("quantization_config") is None
    assert open_model(str(standard), "float32").model.dtype == torch.float32
    capsys.readouterr()
    assert main(["verify", str(standard)]) == 0
    assert "OK" in capsys.readouterr().out


def test_verify_notices_other_codes(tmp_path, capsys):
    _, standard = make_folders(tmp_path, GRIDS[1])
    name = CompressedShards(standard).coded[0].replace(".weight", ".weight_packed")
    entry = Shards(standard).entries[name]
    raw = bytearray(entry.file.read_bytes())
    raw[entry.offset : entry.offset + entry.nbytes] = b"\x88" * entry.nbytes  # code 0 is stored as 8
    entry.file.write_bytes(raw)
    capsys.readouterr()
    assert main(["verify", str(standard)]) == 1
    assert "0 non-zeros, but the report says" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"symmetric": False}, {"strategy": "channel"}, {"type": "float"}, {"num_bits": 2}])
def test_other_forms_of_the_library_are_refused(change, tmp_path, capsys):
    _, standard = make_folders(tmp_path, GRIDS[1])
    config = json.loads((standard / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (standard / "config.json").write_text(json.dumps(config))
    assert not is_compressed(standard)
    capsys.readouterr()
    line = refused(capsys, "eval", "--model", standard, "--text", tmp_path / "text.txt")
    assert "holds compressed-tensors weights" in line


# Refusals


def test_bad_requests_are_refused_in_one_line(tmp_path, capsys):
    quantized, standard = make_folders(tmp_path, GRIDS[1])
    capsys.readouterr()

    def error(folder, name="new") -> str:
        line = refused(capsys, "pack", folder, "--output", tmp_path / name, "--format", "compressed-tensors")
        assert not (tmp_path / "new").exists()
        return line

    assert "needs a model quantized" in error(tmp_path / "pruned")
    assert "needs a model quantized" in error(tmp_path / "dense")  # has no report
    assert "holds compressed-tensors weights" in error(standard)
    assert "exists" in error(quantized, "standard")
    assert main(["pack", str(quantized), "--output", str(tmp_path / "packed")]) == 0
    assert "is packed" in error(tmp_path / "packed")
    shards, name = Shards(quantized), "model.layers.1.mlp.up_proj.weight"
    shards.write({name: shards.read(name) + 0.01})
    assert "has changed since ace-prune wrote it: " in error(quantized)
    with pytest.raises(InputError, match=f"{name} is not on a grid of 4 bits with groups of 64 columns"):
        compress(quantized, tmp_path / "new", GRIDS[1], [name.removesuffix(".weight")])
    for bad in ("quantize(bits=2)", "quantize(group=1)"):
        report = json.loads((quantized / REPORT_NAME).read_text())
        report["config"]["method"] = bad
        (quantized / REPORT_NAME).write_text(json.dumps(report))
        assert "names no grid" in error(quantized)


@pytest.mark.parametrize("family", ["mixtral", "granite-moe", "gpt2"])
def test_what_is_not_a_linear_is_refused(family, tmp_path):
    """Fused experts, and matrices that are stored transposed."""
    dense = save_dense(tmp_path / "dense", "llama" if family == "gpt2" else family)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 64}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(dense)
    report, pruned = prune(dense, tmp_path / "pruned", method="magnitude", calibration={"source": "tokens"})
    names = [matrix.name for matrix in report.matrices]
    with pytest.raises(InputError, match=r"is not one in the files \(fused experts, or a transposed matrix\)"):
        compress(pruned, tmp_path / "new", GRIDS[0], names)
    assert not (tmp_path / "new").exists()


def test_columns_that_no_group_divides_are_refused(tmp_path):
    dense = save_dense(tmp_path / "dense")
    path = dense / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 50}))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense)).bfloat16().save_pretrained(dense)
    _, pruned = prune(dense, tmp_path / "pruned", method="magnitude")
    names = [matrix.name for matrix in read_report(pruned).matrices]
    with pytest.raises(InputError, match="columns are multiples of 8"):  # before it prunes
        prune(dense, tmp_path / "out", {"format": "compressed-tensors"}, method="quantize")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="columns are multiples of 8"):
        compress(quantize_folder(pruned, tmp_path / "q", GRIDS[0]), tmp_path / "new", GRIDS[0], names)


def test_a_run_needs_a_method_that_quantizes(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense")
    text = ["--calibration", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    line = refused(capsys, "run", "--model", dense, *text, "--format", "compressed-tensors")
    assert "is for quantized models; add the stage quantize" in line


def test_a_matrix_without_its_scales_is_refused(tmp_path):
    _, standard = make_folders(tmp_path, GRIDS[0])
    path = standard / "model.safetensors"
    name = b"q_proj.weight_scale"
    path.write_bytes(path.read_bytes().replace(name, name.replace(b"scale", b"scald"), 1))
    with pytest.raises(InputError, match="lacks weight_scale or weight_shape of model"):
        CompressedShards(standard)


def test_values_on_the_grid_are_those_of_the_library(random):
    """Codes are exact in bfloat16, so a product of bfloat16 numbers is rounded once, as here."""
    grid = Grid(8, 128)
    weight = on_grid(torch.randn(4, 128, generator=random).bfloat16(), grid)
    found = grid.recover(weight)
    assert_same_bits(found.codes.bfloat16() * found.scales, weight)
