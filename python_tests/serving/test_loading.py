"""Weights and slots: what an engine's loaders do with the weights of a packed folder.

The loaders here are written as vLLM's are: they cut, select and copy, and know nothing of packed weights.
"""

import pytest
import torch
from folders import prune, save_dense
from helpers import assert_same_bits
from serving.test_matrices import make
from tiny_models import make_tokens

from ace_ext import InputError, load_packed
from ace_ext.packed.files import SUFFIX, PackedShards, dense
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.packed.packing import pack
from ace_ext.serving.product import product_of
from ace_ext.serving.slots import Slot
from ace_ext.serving.stored import StoredWeight, check, weights_of


def stored(weight: torch.Tensor) -> StoredWeight:
    return StoredWeight(PackedMatrix.of(weight.reshape(-1, weight.shape[-1])), weight.shape)


def as_dense(weight):
    return weight if isinstance(weight, torch.Tensor) else dense(weight.check())


# Stored weights


STEPS = {
    "rows": lambda w: w.narrow(0, 2, 3),
    "columns": lambda w: w.narrow(1, 70, 60),
    "both": lambda w: w[1:5, 3:],
    "the last columns": lambda w: w[..., -9:],
    "beyond the end": lambda w: w[4:99],
    "chunk": lambda w: w.chunk(2, dim=0)[1],
    "split columns": lambda w: w.split(50, dim=1)[2],
    "detached": lambda w: w.detach(),
    "half precision": lambda w: w.to(torch.bfloat16),
    "as an expert": lambda w: w.unsqueeze(0).unbind()[0],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_cuts_stay_packed(step, kind):
    weight = make(kind)
    found, expected = STEPS[step](stored(weight)), STEPS[step](weight)
    assert isinstance(found, StoredWeight)
    assert found.shape == expected.shape
    assert_same_bits(as_dense(found.matrix), expected.contiguous())


EXPERT_STEPS = {
    "one": lambda w: w[1],
    "the last": lambda w: w[-1],
    "some": lambda w: w[1:],
    "gate and up": lambda w: w.chunk(2, dim=1)[1],
    "columns": lambda w: w.narrow(2, 10, 99),
    "all": lambda w: w.unbind()[2],
    "as a matrix": lambda w: w.view(-1, 200),
}


@pytest.mark.parametrize("step", EXPERT_STEPS)
def test_cuts_of_fused_experts_stay_packed(step):
    weight = make("ragged", shape=(18, 200)).view(3, 6, 200)
    found, expected = EXPERT_STEPS[step](stored(weight)), EXPERT_STEPS[step](weight)
    assert isinstance(found, StoredWeight)
    assert found.shape == expected.shape
    assert_same_bits(as_dense(found.matrix).view(expected.shape), expected.contiguous())


OTHER_STEPS = {
    "transposed": lambda w: w.t(),
    "every second": lambda w: w[::2],
    "one row": lambda w: w[2],
    "a sum": lambda w: w + 1,
    "turned halves": lambda w: w.view(2, 3, 200).transpose(0, 1).reshape(6, 200),
    "other columns": lambda w: w.view(12, 100),
    "copied": lambda w: torch.zeros(6, 200).copy_(w),
    "compared": lambda w: torch.equal(w, w) * torch.ones(1),
}


@pytest.mark.parametrize("step", OTHER_STEPS)
def test_other_steps_get_the_dense_tensor(step):
    weight = make("even")
    found = OTHER_STEPS[step](stored(weight))
    assert not isinstance(found, StoredWeight)
    assert_same_bits(found.contiguous(), OTHER_STEPS[step](weight).contiguous())


@pytest.mark.parametrize(("codec", "config"), [("bitmap", {}), ("archive", {}), ("nm", {"pattern": "2:4"})])
@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "granite-moe"])
def test_weights_of_every_format(codec, config, family, tmp_path):
    source = save_dense(tmp_path / "dense", family, torch.bfloat16)
    prune(source, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude", **config)
    pack(tmp_path / "pruned", tmp_path / "packed", codec, (2, 4) if config else None)
    shards, found = PackedShards(tmp_path / "packed"), dict(weights_of(tmp_path / "packed"))
    assert found.keys() == shards.entries.keys()
    assert any(isinstance(weight, StoredWeight) for weight in found.values())
    for name, weight in found.items():
        assert (weight.shape, weight.dtype) == (shards.entries[name].shape, shards.entries[name].dtype)
        assert_same_bits(weight.unpacked() if isinstance(weight, StoredWeight) else weight, shards.read(name))


def test_a_damaged_folder_is_named(tmp_path):
    source = save_dense(tmp_path / "dense", "llama", torch.float32)
    prune(source, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(tmp_path / "pruned", tmp_path / "packed", "bitmap")
    (file,) = (tmp_path / "packed").glob(f"*{SUFFIX}")
    shards = PackedShards(tmp_path / "packed")
    packed = next(name for name in shards.entries if isinstance(shards.load(name), PackedMatrix))
    place = shards._owner[packed]._entries[f"{packed}.bitmap"].offset
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for step in (lambda folder: list(weights_of(folder)), check):
        with pytest.raises(InputError, match=f"{SUFFIX} is damaged .{packed}: bitmap does not have"):
            step(tmp_path / "packed")
    file.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=SUFFIX):
        check(tmp_path / "packed")
    file.write_bytes(whole)
    check(tmp_path / "packed")


# Slots, with loaders as vLLM has them


def load_column_parallel(slot, weight, rank):
    size = slot.shape[0]
    slot.data.copy_(weight.narrow(0, rank * size, size))


def load_row_parallel(slot, weight, rank):
    size = slot.shape[1]
    slot.data.copy_(weight.narrow(1, rank * size, size))


def load_merged(slot, weights, rank):
    """Several weights below each other, each rank with its share of all: q, k, v, or gate and up."""
    offset, size = 0, slot.shape[0]
    whole = sum(len(weight) for weight in weights)
    for weight in weights:
        part = len(weight) * size // whole
        slot.data.narrow(0, offset, part).copy_(weight.narrow(0, rank * part, part))
        offset += part


def parameter(*shape, dtype=torch.float32) -> torch.nn.Parameter:
    found = torch.nn.Parameter(Slot(shape, dtype), requires_grad=False)
    assert isinstance(found, Slot)
    assert isinstance(found, torch.nn.Parameter)
    return found


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_have_their_rows(kind, ranks):
    weight = make(kind)
    found = []
    for rank in range(ranks):
        slot = parameter(6 // ranks, 200)
        load_column_parallel(slot, stored(weight), rank)
        found += slot.matrices("weight")
    assert all(isinstance(one, PackedMatrix) for one in found[1:])
    assert_same_bits(torch.cat([as_dense(one) for one in found]), weight)


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_have_their_columns(kind, ranks, random):
    weight = make(kind, shape=(40, 200))
    found = []
    for rank in range(ranks):
        slot = parameter(40, 200 // ranks)
        load_row_parallel(slot, stored(weight), rank)
        found += slot.matrices("weight")
    assert any(isinstance(one, PackedMatrix) for one in found)
    assert_same_bits(torch.cat([as_dense(one) for one in found], dim=1), weight)


@pytest.mark.parametrize("kinds", [["even"] * 3, ["even", "ragged", "even"], ["even", "dense", "even"]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_projections(kinds, ranks):
    """Also if one is stored dense, or rows have other numbers of survivors."""
    shapes = [(40, 200), (20, 200), (20, 200)]
    dense_ones = [
        torch.randn(shape, generator=torch.Generator().manual_seed(9)) if kind == "dense" else make(kind, shape=shape)
        for kind, shape in zip(kinds, shapes, strict=True)
    ]
    given = [one if kind == "dense" else stored(one) for kind, one in zip(kinds, dense_ones, strict=True)]
    for rank in range(ranks):
        slot = parameter(80 // ranks, 200)
        load_merged(slot, given, rank)
        (found,) = slot.matrices("qkv_proj.weight")
        assert isinstance(found, PackedMatrix)
        assert (found.row_start is None) == (kinds == ["even"] * 3)
        expected = [one.chunk(ranks)[rank] for one in dense_ones]
        assert_same_bits(as_dense(found), torch.cat(expected))


def test_what_is_dense_in_the_files_stays_dense(random):
    weight = torch.randn(6, 200, generator=random)
    slot = parameter(6, 200)
    slot.data.copy_(weight)
    (found,) = slot.matrices("weight")
    assert_same_bits(found, weight)


def test_a_packed_part_that_makes_the_whole_no_smaller(random):
    """One sparse row among many dense ones."""
    weights = [make("even", shape=(1, 200)), torch.randn(200, 200, generator=random)]
    slot = parameter(201, 200)
    load_merged(slot, [stored(weights[0]), weights[1]], 0)
    (found,) = slot.matrices("weight")
    assert isinstance(found, torch.Tensor)
    assert_same_bits(found, torch.cat(weights))


def test_padded_rows_are_zeros():
    """As an output head is padded to a multiple of 64 rows."""
    weight, slot = make("even", shape=(50, 200)), parameter(64, 200)
    slot[:50].data.copy_(stored(weight))
    slot[50:].data.fill_(0)
    (found,) = slot.matrices("lm_head.weight")
    assert isinstance(found, PackedMatrix)
    assert_same_bits(as_dense(found), torch.cat([weight, torch.zeros(14, 200)]))


def test_columns_beside_each_other_and_padding():
    weight, slot = make("even", shape=(40, 200)), parameter(48, 256)
    slot.data.zero_()
    slot.data[:40, :100].copy_(stored(weight)[:, :100])
    slot.data[:40, 100:200].copy_(stored(weight)[:, 100:])
    (found,) = slot.matrices("weight")
    assert isinstance(found, PackedMatrix)
    assert_same_bits(as_dense(found), torch.nn.functional.pad(weight, (0, 56, 0, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slot_decides_the_dtype(dtype):
    weight, slot = make("even", torch.bfloat16), parameter(6, 200, dtype=dtype)
    slot.data.copy_(stored(weight))
    (found,) = slot.matrices("weight")
    assert_same_bits(as_dense(found), weight.to(dtype))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts(fused, ranks):
    """Gate and up of each expert below each other; the files hold them one by one, or all in one tensor."""
    gates, ups = make("even", shape=(3 * 20, 200)).view(3, 20, 200), make("ragged", shape=(60, 200)).view(3, 20, 200)
    for rank in range(ranks):
        slot, size = parameter(3, 40 // ranks, 200), 20 // ranks
        both = stored(torch.cat([gates, ups], dim=1))
        for expert in range(3):
            if fused:
                gate, up = both.chunk(2, dim=1)[0].unbind()[expert], both.chunk(2, dim=1)[1].unbind()[expert]
            else:
                gate, up = stored(gates[expert]), stored(ups[expert])
            data = slot.data[expert]
            data.narrow(0, 0, size).copy_(gate.narrow(0, rank * size, size))
            data.narrow(0, size, size).copy_(up.narrow(0, rank * size, size))
        found = slot.matrices("w13_weight")
        rows = slice(rank * size, (rank + 1) * size)
        for expert, one in enumerate(found):
            assert isinstance(one, PackedMatrix)
            assert_same_bits(as_dense(one), torch.cat([gates[expert][rows], ups[expert][rows]]))


def test_all_experts_at_once():
    weight, slot = make("even", shape=(60, 200)).view(3, 20, 200), parameter(3, 20, 200)
    slot.data.copy_(stored(weight))
    assert_same_bits(torch.stack([as_dense(one) for one in slot.matrices("w2_weight")]), weight)


def test_a_weight_that_is_loaded_twice_is_the_last_one():
    slot = parameter(6, 200)
    slot.data.copy_(stored(make("even")))
    slot.data.copy_(stored(make("even", seed=1)))
    assert_same_bits(as_dense(slot.matrices("weight")[0]), make("even", seed=1))


def test_nothing_keeps_the_files_in_memory():
    """Neither a slot that an engine keeps, nor a product with some rows of a weight."""
    weight, slot = stored(make("even", shape=(60, 200))), parameter(20, 200)
    slot.data.copy_(weight[:20])
    (found,) = slot.matrices("weight")
    assert slot.pieces == []
    product = product_of(found)
    assert product.values.untyped_storage().nbytes() == product.values.nbytes < weight.matrix.values.nbytes


def test_a_weight_that_was_not_loaded_is_named():
    slot = parameter(12, 200)
    slot.data[:6].copy_(stored(make("even")))
    with pytest.raises(InputError, match=r"layers\.0\.qkv_proj\.weight is \[12, 200\] .* hold only 1200 of its 2400"):
        slot.matrices("layers.0.qkv_proj.weight")
    with pytest.raises(InputError, match="hold only 0 of its 2400"):
        parameter(12, 200).matrices("weight")


def test_another_shape_is_refused():
    with pytest.raises(InputError, match=r"must be \[5, 200\] by the configuration \(got \[6, 200\]\)"):
        parameter(5, 200).data.copy_(stored(make("even")))


def test_other_steps_with_a_slot_are_refused():
    slot = parameter(6, 200)
    for step in (lambda: slot + 1, lambda: slot.fill_(1), lambda: slot[::2], lambda: slot[0], lambda: slot.clone()):
        with pytest.raises(NotImplementedError, match="packed weight"):
            step()
    assert slot.data.to("meta").shape == (6, 200)  # vLLM notes the shapes of all parameters


def test_a_whole_model_through_slots(tmp_path):
    """Attention and MLP of each layer as vLLM merges them give the logits of the packed model."""
    source = save_dense(tmp_path / "dense", "llama", torch.float32)
    prune(source, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(tmp_path / "pruned", tmp_path / "packed", "bitmap")
    weights, model = dict(weights_of(tmp_path / "packed")), load_packed(tmp_path / "packed")
    mlp = model.model.layers[0].mlp
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
    slot = parameter(2 * mlp.gate_proj.out_features, mlp.gate_proj.in_features)
    load_merged(slot, [weights[name] for name in names], 0)
    (found,) = slot.matrices("gate_up_proj.weight")
    assert_same_bits(as_dense(found), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    with torch.no_grad():
        assert torch.isfinite(model(make_tokens(1, 4)).logits).all()
