"""Packed token embeddings and LM heads: the rows, states and texts of the dense model, and ties and classes' own
factors are kept."""

import copy
import json
import pickle

import pytest
import torch
from folders import prune, save_dense
from helpers import assert_same_bits, make_weight, rest_nightly
from quantized_folders import on_grid
from runtime.test_packed_models import dense_model
from tiny_models import make_model, make_tokens
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import ace_ext
from ace_ext import InputError, load_packed, prune_model
from ace_ext.cli.main import main
from ace_ext.grids import Grid
from ace_ext.models.safetensors_files import Shards
from ace_ext.packed.files import KEY, PackedShards
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.packing import pack, unpack
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.packed.rows import take_rows
from ace_ext.runs.verify import verify
from ace_ext.runtime import PackedEmbedding, QuantizedLinear
from ace_ext.runtime.embedding import pack_embedding_
from ace_ext.runtime.rows import packed_rows, quantized_rows

ace_ext.register()
METHOD = "magnitude + quantize(bits=4, embeddings=8)"
FAMILIES = ("llama", "llama-tied", "qwen2", "opt", "gemma3", "mixtral")


def make_folders(folder, family="llama-tied", codec="bitmap", dtype=torch.bfloat16, pattern=None):
    """A pruned folder with rounded tables, and the packed one."""
    dense = save_dense(folder / "dense", family, dtype)
    _, out = prune(dense, folder / "out", {"format": codec}, {"source": "tokens"}, method=METHOD, pattern=pattern)
    unpack(out, folder / "unpacked")
    return folder / "unpacked", out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("tied"))


@pytest.fixture
def model(folders):
    return load_packed(folders[1])


# Folders


@pytest.mark.parametrize("family", rest_nightly(["llama", "gemma3"], FAMILIES))
def test_a_model_is_that_of_the_dense_folder(family, tmp_path):
    unpacked, packed = make_folders(tmp_path, family, dtype=torch.float32)
    dense, tokens = dense_model(unpacked), make_tokens(2, 16)
    for model in (load_packed(packed), AutoModelForCausalLM.from_pretrained(packed)):
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert isinstance(embedding, PackedEmbedding)
        assert isinstance(head, QuantizedLinear)
        assert (embedding.bits, head.bits) == (8, 8)
        tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
        assert (head.bitmap.data_ptr() == embedding.bitmap.data_ptr()) == tied
        assert_same_bits(embedding(tokens), dense.get_input_embeddings()(tokens))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)
        assert model.state_dict().keys() == dense.state_dict().keys()
        for name, tensor in dense.state_dict().items():
            assert_same_bits(model.state_dict()[name], tensor)
        model.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved/model.safetensors").read_bytes() == (unpacked / "model.safetensors").read_bytes()
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(model.generate(tokens, **options), dense.generate(tokens, **options))


@pytest.mark.parametrize("codec", ["bitmap", "nm", "archive"])
def test_every_format_gives_the_folder_back(codec, tmp_path):
    """``nm`` stores rows of N of M; a table has no zeros, so there it stays as it is."""
    unpacked, packed = make_folders(tmp_path, "llama", codec, pattern="2:4")
    assert verify(packed).problems == verify(unpacked).problems == []
    (file,) = PackedShards(packed).packed
    tables = {"lm_head.weight": Grid(8, 128), "model.embed_tokens.weight": Grid(8, 128)}
    assert file.origin.tables == ({} if codec == "nm" else tables)
    assert file.origin.version == ("2" if codec == "nm" else "3")
    result = pack(unpacked, tmp_path / "again", codec, (2, 4), Grid(4, 128), tables)
    assert result.tables == len(file.origin.tables)
    assert (tmp_path / "again" / file.path.name).read_bytes() == file.path.read_bytes()
    assert main(["pack", str(unpacked), "--output", str(tmp_path / "third"), "--format", codec]) == 0
    assert (tmp_path / "third" / file.path.name).read_bytes() == file.path.read_bytes()
    model = load_packed(packed)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == (codec != "nm")


def test_a_dense_table_that_is_named_stays_dense(folders, tmp_path):
    """A table that has left the grid, and one that no file has."""
    unpacked, _ = folders
    shards = Shards(unpacked)
    name = "model.embed_tokens.weight"
    dense = shards.read(name)
    changed = dense.clone()
    changed[0, 0] = changed[0].abs().max() * 0.501
    shards.write({name: changed})
    tables = {name: Grid(8, 128), "absent.weight": Grid(8, 128)}
    result = pack(unpacked, tmp_path / "packed", "bitmap", None, Grid(4, 128), tables)
    shards.write({name: dense})
    assert result.tables == 0
    assert PackedShards(tmp_path / "packed").packed[0].origin.tables == {}
    assert_same_bits(load_packed(tmp_path / "packed").get_input_embeddings().weight.detach(), changed)
    with pytest.raises(InputError, match=r"grid of x must be an ace_ext\.grids\.Grid \(got int\)"):
        pack(unpacked, tmp_path / "other", "bitmap", None, None, {"x": 8})


def test_metadata_with_tables_is_checked(folders):
    _, packed = folders
    (file,) = PackedShards(packed).packed
    header = json.loads(file.origin.to_json())
    assert header["tables"] == {"model.embed_tokens.weight": {"bits": 8, "group": 128}}
    for bad in (5, {"model.embed_tokens.weight": 5}, {"model.embed_tokens.weight": {"bits": 9, "group": 128}}, None):
        with pytest.raises(InputError, match="damaged metadata"):
            type(file.origin).of(file.path, {KEY: json.dumps(header | {"tables": bad})})


# The module


def test_rows_of_uniform_and_of_ragged_matrices(dtype, random):
    grid = Grid(8, 64)
    weight = on_grid(make_weight(9, 130, dtype, random), grid)
    ragged = torch.where(torch.rand(9, 130, generator=random) < torch.rand(9, 1, generator=random), weight, 0)
    ragged[4] = 0
    rows = torch.tensor([8, 0, 4, 4, 7, 0])
    for dense in (weight, ragged, on_grid(weight[:, :1].repeat(1, 130), grid)):
        for matrix in (PackedMatrix.of(dense), QuantizedMatrix.of(dense, grid)):
            assert_same_bits(take_rows(matrix, rows).check().dense(), dense[rows])
            assert take_rows(matrix, rows[:0]).dense().shape == (0, 130)
            for bad in (-1, 9):
                with pytest.raises(IndexError):
                    take_rows(matrix, torch.tensor([0, bad]))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_lookups_of_any_shape(shape, kind, random):
    dense = nn.Embedding.from_pretrained(on_grid(make_weight(11, 70, torch.bfloat16, random), Grid(8, 64)))
    packed = copy.deepcopy(dense)
    pack_embedding_(packed, QuantizedMatrix.of(dense.weight, Grid(8, 64)))
    tokens = torch.randint(0, 11, shape, generator=random).to(kind)
    assert_same_bits(packed(tokens), dense(tokens))
    assert type(packed) is PackedEmbedding
    assert list(packed.parameters()) == []
    assert packed.weight.shape == (11, 70)
    assert_same_bits(functional.embedding(tokens.long(), packed.weight), dense(tokens))
    with pytest.raises(IndexError):
        packed(torch.tensor([11]))


def test_copies_pickles_and_other_dtypes(model, tmp_path):
    tokens = make_tokens(2, 16)
    with torch.no_grad():
        logits = model(tokens).logits
        torch.save(model, tmp_path / "model.pt")
        restored = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
            assert isinstance(other.get_input_embeddings(), PackedEmbedding)
            assert torch.equal(other(tokens).logits, logits)
        wide = copy.deepcopy(model).float()
        assert wide(tokens).logits.dtype == torch.float32
        assert_same_bits(wide.get_input_embeddings()(tokens).bfloat16(), model.get_input_embeddings()(tokens))


def test_a_scaled_embedding_keeps_its_class(tmp_path):
    """Gemma multiplies a lookup by a factor."""
    unpacked, packed = make_folders(tmp_path, "gemma3")
    model, dense = load_packed(packed), dense_model(unpacked)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, type(dense.get_input_embeddings()))
    tokens = make_tokens(1, 8)
    for each in (embedding, copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert_same_bits(each(tokens), dense.get_input_embeddings()(tokens))


def test_a_state_dict_is_loaded_into_the_same_grid(model, folders):
    other = make_model("llama-tied", torch.bfloat16, seed=1)
    prune_model(other, make_tokens(8, 16), method=METHOD)
    model.load_state_dict(other.state_dict())
    tokens = make_tokens(2, 16)
    assert_same_bits(model.get_input_embeddings()(tokens), other.get_input_embeddings()(tokens))
    changed = dict(other.state_dict())
    changed["model.embed_tokens.weight"] = torch.randn_like(changed["model.embed_tokens.weight"])
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight must be on the grid of PackedEmbedding"):
        model.load_state_dict(changed)


def test_tying_again_changes_nothing(model):
    embedding = model.get_input_embeddings()
    model.tie_weights()
    assert embedding.bitmap.data_ptr() == model.get_output_embeddings().bitmap.data_ptr()
    assert "weight" not in dict(embedding.named_parameters())
    assert model.num_parameters() > 0


def test_a_head_can_be_tied_to_another_embedding(tmp_path):
    _, packed = make_folders(tmp_path, "llama")
    model = load_packed(packed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.bitmap is not embedding.bitmap
    head.weight = embedding.weight
    assert_same_bits(head.weight, embedding.weight.detach())
    other = QuantizedLinear(QuantizedMatrix.of(torch.ones(2, 64), Grid(8, 64)))
    embedding = nn.Embedding.from_pretrained(torch.ones(2, 64))
    pack_embedding_(embedding, PackedMatrix.of(embedding.weight))
    with pytest.raises(InputError, match="cannot share the weight of a module of another form"):
        other.weight = embedding.weight


def test_a_state_dict_holds_a_shared_weight_once_and_nothing_else(model):
    for _ in range(2):
        state = model.state_dict()
        assert vars(state).keys() == {"_metadata"}  # torch.save writes these too
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        state["lm_head.weight"].zero_()
    assert model.state_dict()["lm_head.weight"].any()


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_a_compiled_model(family, tmp_path):
    _, packed = make_folders(tmp_path, family)
    model, tokens = load_packed(packed), make_tokens(1, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("kind", [PackedMatrix.of, lambda weight: QuantizedMatrix.of(weight, Grid(8, 64))])
def test_a_lookup_is_one_graph_for_any_number_of_tokens(kind, random):
    weight = on_grid(make_weight(11, 70, torch.bfloat16, random), Grid(8, 64))
    embedding = nn.Embedding.from_pretrained(weight)
    pack_embedding_(embedding, kind(weight))

    def scaled(tokens):
        return embedding(tokens) * torch.ones((), dtype=embedding.weight.dtype)

    torch.compiler.reset()
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (5, 3, 7):
        tokens = torch.randint(0, 11, (2, count), generator=random)
        with torch.compiler.set_stance("default" if count == 5 else "fail_on_recompile"):
            assert_same_bits(compiled(tokens), weight[tokens])


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged, random):
    weight = on_grid(make_weight(11, 70, torch.float32, random), Grid(8, 64))
    if ragged:
        weight[:6] = 0
    rows, values, codes = torch.tensor([3, 0, 10]), PackedMatrix.of(weight), QuantizedMatrix.of(weight, Grid(8, 64))
    assert (values.row_start is not None) == (codes.row_start is not None) == ragged
    torch.library.opcheck(packed_rows, (rows, values.bitmap, values.values, values.row_start, 70))
    tensors = codes.bitmap, codes.codes, codes.scales
    torch.library.opcheck(quantized_rows, (rows, *tensors, codes.bits, codes.group, codes.row_start, 70))
