"""``ace-prune run --format``: the bytes of ``run`` and ``pack``, the memory limit, crashes, and the plan."""

import itertools
import os
import shutil

import pytest
from folders import TEXT, bad_input, prune, save_dense, tree
from helpers import assert_same_bits, rest_nightly
from runs.test_plan import plan_of
from tiny_models import VOCABULARY, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM

from ace_ext import InputError
from ace_ext.cli.main import main
from ace_ext.formats import _packed, written_shards
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed import CODECS
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.packing import check_hashes, pack
from ace_ext.records import REPORT_NAME
from ace_ext.runs.own_files import MANIFEST_NAME, foreign_files
from ace_ext.runs.unfinished import recover
from ace_ext.runs.verify import verify

SETTINGS = {"nm": {"pattern": "2:4"}}
DIFFER = (REPORT_NAME, MANIFEST_NAME)  # seconds and memory; names, and the format in the fingerprint


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("run") / "dense", max_shard_size="40KB")


def files(folder):
    return {name: value for name, value in tree(folder).items() if name not in DIFFER}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_the_bytes_are_those_of_run_and_pack(name, offload, dense, tmp_path):
    settings = SETTINGS.get(name, {})
    prune(dense, tmp_path / "plain", {"offload": offload}, **settings)
    pack(tmp_path / "plain", tmp_path / "packed", name, (2, 4) if settings else None)
    _, path = prune(dense, tmp_path / "out", {"format": name, "offload": offload}, **settings)
    assert files(path) == files(tmp_path / "packed")
    assert len(PackedShards(path).files) > 1
    assert not foreign_files(path)
    assert not (tmp_path / ".out.unfinished").exists()
    result = verify(path)
    assert not result.problems
    assert result.exact_rows == result.rows > 0


@pytest.mark.parametrize(("bits", "group"), rest_nightly([(4, 128)], [(8, 64), (4, 128), (3, 64)], several=True))
@pytest.mark.parametrize("name", [*CODECS, "compressed-tensors"])
def test_a_quantized_run_writes_codes(name, bits, group, dense, tmp_path):
    """The bytes of ``run`` and ``pack``; the report's method names the grid."""
    settings = {"method": f"magnitude + quantize(bits={bits}, group={group})", **SETTINGS.get(name, {})}
    _, plain = prune(dense, tmp_path / "plain", **settings)
    assert main(["pack", str(plain), "--output", str(tmp_path / "packed"), "--format", name]) == 0
    _, path = prune(dense, tmp_path / "out", {"format": name}, **settings)
    assert files(path) == files(tmp_path / "packed")
    if name in CODECS:
        grid, _ = PackedShards(path).code_bits()
        assert (grid.bits, grid.group) == (bits, group)
        assert not verify(path).problems
    written, expected = written_shards(path), Shards(plain)
    for tensor in expected.entries:
        assert_same_bits(written.read(tensor), expected.read(tensor))


def test_a_resumed_run_measures_what_it_wrote(dense, tmp_path, monkeypatch):
    """A run that ends after the exchange reads its perplexity from the codes."""
    settings = {"method": "magnitude + quantize(bits=8, group=64)"}
    options, text = {"format": "compressed-tensors"}, {"evaluate": str(dense.parent / "text.txt")}
    report, expected = prune(dense, tmp_path / "whole", options, text, **settings)
    real = os.replace

    def fail(*arguments, **given):
        if str(arguments[-1]).endswith("out"):
            raise OSError(28, os.strerror(28))
        return real(*arguments, **given)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(InputError, match="continue with --resume"):
            prune(dense, tmp_path / "out", options, text, **settings)
    again, path = prune(dense, tmp_path / "out", {**options, "resume": True}, text, **settings)
    assert files(path) == files(expected)
    assert again.perplexity.pruned == pytest.approx(report.perplexity.pruned, abs=1e-3)


PLACES = {
    "before packing": (_packed, "pack_into"),
    "before the exchange": (_packed.Path, "rename"),
    "in the exchange": (_packed.Path, "rename"),
    "after it": (os, "replace"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_ends_while_it_packs_is_resumed(place, dense, tmp_path, monkeypatch):
    _, expected = prune(dense, tmp_path / "whole", {"format": "bitmap"})
    owner, name = PLACES[place]
    real, calls = getattr(owner, name), []

    def fail(*arguments, **options):
        ours = name != "replace" or str(arguments[-1]).endswith("out")
        calls.extend([None] * ours)
        if ours and len(calls) == (2 if place == "in the exchange" else 1):
            raise OSError(28, os.strerror(28))
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(InputError, match="continue with --resume"):
            prune(dense, tmp_path / "out", {"format": "bitmap"})
    place_of_run = tmp_path / ".out.unfinished"
    assert (place_of_run / "model").is_dir() == (place != "in the exchange")
    assert is_packed(place_of_run / "model") == (place == "after it")
    _, path = prune(dense, tmp_path / "out", {"format": "bitmap", "resume": True})
    assert files(path) == files(expected)
    check_hashes(PackedShards(path))
    assert not place_of_run.exists()


def test_a_killed_exchange_is_completed_only_with_a_whole_folder(dense, tmp_path):
    folder = tmp_path / ".out.unfinished"
    for name in ("packed", "dense"):
        shutil.copytree(dense, folder / name)
    recover(tmp_path / "out")
    assert (folder / "model").is_dir()
    assert not (folder / "packed").exists()
    (folder / "packed").mkdir()
    recover(tmp_path / "out")  # nothing to exchange: the packed folder may be incomplete
    assert (folder / "packed").is_dir()


def test_the_plan_knows_the_size(dense, tmp_path):
    for name, settings in (("dense", {}), ("bitmap", {}), ("nm", {"pattern": "2:4"})):
        planned = plan_of(dense, {"format": name}, **settings)
        _, path = prune(dense, tmp_path / name, {"format": name}, **settings)
        if name == "dense":
            weights = planned.output_bytes
            assert weights == sum(p.stat().st_size for p in path.glob("*.safetensors")) - headers(path)
        else:
            stored = sum(t.nbytes for one in PackedShards(path).packed for t in parts(one))
            assert planned.output_bytes == stored < weights
        assert f"weights in the output: {planned.output_bytes / 1e9:.3f} GB" in planned.table()
    for at, (name, tables) in enumerate(itertools.product(("bitmap", "compressed-tensors"), (0, 8))):
        settings = {"method": f"magnitude + quantize(bits=8, group=64, embeddings={tables})"}
        planned = plan_of(dense, {"format": name}, **settings)
        _, path = prune(dense, tmp_path / f"quantized{at}", {"format": name}, **settings)
        stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) - headers(path)
        assert stored == pytest.approx(planned.output_bytes, rel=0.05)
        assert f"weights in the output: about {planned.output_bytes / 1e9:.3f} GB" in planned.table()
    archive = plan_of(dense, {"format": "archive"})
    assert archive.output_bytes < weights / 2
    assert "weights in the output: about " in archive.table()
    assert archive.write_bytes > plan_of(dense).write_bytes


def test_a_pattern_in_columns_of_the_files_is_refused(tmp_path):
    """GPT-2's matrices are stored as ``[d_in, d_out]``: no row of the files has the pattern."""
    dense = save_gpt2(tmp_path / "dense")
    with pytest.raises(InputError, match=r"format nm needs N:M along the rows .* are stored transposed; use format"):
        prune(dense, tmp_path / "out", {"format": "nm"}, pattern="2:4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]
    with pytest.raises(InputError, match=r"format nm needs N:M along the rows"):
        plan_of(dense, {"format": "nm"}, pattern="2:4")
    with pytest.raises(InputError, match=r"format compressed-tensors stores the weights of Linears, and .*c_attn"):
        plan_of(dense, {"format": "compressed-tensors"}, method="quantize")
    _, plain = prune(dense, tmp_path / "plain", pattern="2:4")
    with pytest.raises(InputError, match=r"2:4 along the rows of its tensor .* use format bitmap"):
        pack(plain, tmp_path / "packed", "nm", (2, 4))


def test_the_plan_knows_which_matrices_have_no_grid_in_the_files(tmp_path):
    dense = save_gpt2(tmp_path / "dense", n_embd=128)
    settings = {"method": "magnitude + quantize(bits=4)"}
    planned = plan_of(dense, {"format": "bitmap"}, **settings)
    _, path = prune(dense, tmp_path / "out", {"format": "bitmap"}, **settings)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) - headers(path)
    assert stored == pytest.approx(planned.output_bytes, rel=0.05)


def test_the_plan_knows_which_experts_have_no_pattern_in_the_files(tmp_path):
    """GPT-OSS stores its experts transposed, and the other matrices by rows."""
    size = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
    dense = tmp_path / "dense"
    GptOssForCausalLM(GptOssConfig(**size, **heads, num_local_experts=2)).bfloat16().save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text(TEXT)
    planned = plan_of(dense, {"format": "nm"}, pattern="2:4")
    _, path = prune(dense, tmp_path / "out", {"format": "nm"}, pattern="2:4")
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) - headers(path)
    assert stored == pytest.approx(planned.output_bytes, rel=0.01)
    assert planned.output_bytes < plan_of(dense).output_bytes


def save_gpt2(folder, n_embd=32):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=n_embd, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def headers(folder) -> int:
    return sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in folder.glob("*.safetensors"))


def parts(one):
    """Every stored tensor except padding."""
    return (one._stored(name) for name in one._entries if not name.startswith("pad."))


def test_bad_formats_are_refused_before_anything_is_written(dense, capsys):
    assert "format nm is for N:M patterns" in bad_input(capsys, "run", dense, "--format", "nm")
    assert "is for quantized models; add the stage quantize" in bad_input(
        capsys, "run", dense, "--format", "compressed-tensors"
    )
    error = bad_input(capsys, "run", dense, "--format", "bitmap", "--method", "distill")
    assert "distill writes format dense (got bitmap)" in error
    assert "leave out format, then convert the output by ace-prune pack OUTPUT --output PACKED --format bitmap" in error
    error = bad_input(capsys, "run", dense, "--format", "archive", "--max-memory", "10MB")
    assert "max-memory must be at least" in error
