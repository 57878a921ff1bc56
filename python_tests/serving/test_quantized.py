"""Quantized survivors: cut, stacked, multiplied and loaded as other packed weights are."""

import pytest
import torch
from folders import prune, save_dense
from helpers import assert_same_bits
from quantized_folders import on_grid, quantize_folder
from serving.test_loading import as_dense, load_merged, load_row_parallel, parameter
from serving.test_matrices import make

from ace_ext.grids import Grid
from ace_ext.packed.files import PackedShards, dense
from ace_ext.packed.matrix import PackedMatrix, row_counts
from ace_ext.packed.packing import pack
from ace_ext.packed.quantized_matrix import QuantizedMatrix
from ace_ext.serving.matrices import cut_columns, cut_rows, stack
from ace_ext.serving.product import QuantizedProduct, product_of
from ace_ext.serving.stored import StoredWeight, weights_of

GRIDS = [Grid(8, 128), Grid(4, 64), Grid(4, 128), Grid(3, 128)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.group}")
kinds = pytest.mark.parametrize("kind", ["even", "ragged"])


def quantized(grid, kind="even", dtype=torch.float32, seed=0, shape=(6, 300)):
    """A weight on a grid, and its packed matrix."""
    weight = on_grid(make(kind, dtype, seed, shape), grid)
    matrix = QuantizedMatrix.of(weight, grid)
    assert matrix is not None
    return weight, matrix


@grids
@kinds
@pytest.mark.parametrize("rows", [(0, 6), (2, 5), (5, 6), (3, 3)])
def test_rows(grid, kind, rows, dtype):
    weight, matrix = quantized(grid, kind, dtype)
    found = cut_rows(matrix, *rows)
    assert isinstance(found, QuantizedMatrix)
    assert_same_bits(dense(found.check()), weight[slice(*rows)])


@grids
@kinds
@pytest.mark.parametrize("cols", [(0, 300), (0, 64), (64, 300), (128, 256), (192, 200), (37, 101), (299, 300)])
def test_columns(grid, kind, cols, dtype):
    """Codes are kept if the cut begins with a word of the bitmap."""
    weight, matrix = quantized(grid, kind, dtype)
    found = cut_columns(matrix, *cols)
    assert isinstance(found, QuantizedMatrix) == (cols[0] % 64 == 0)
    assert found.check().cols == cols[1] - cols[0]
    assert_same_bits(dense(found), weight[:, slice(*cols)].contiguous())


@grids
@pytest.mark.parametrize("kinds", [["even"], ["even", "even"], ["even", "ragged"], ["ragged"] * 3])
def test_stacks(grid, kinds, dtype):
    weights, matrices = zip(*(quantized(grid, kind, dtype, seed) for seed, kind in enumerate(kinds)), strict=True)
    found = stack(matrices)
    assert isinstance(found, QuantizedMatrix)
    survivors = {int(count) for one in matrices for count in row_counts(one.bitmap.numpy())}  # some round to 0
    assert (found.row_start is None) == (len(survivors) == 1)
    assert_same_bits(dense(found.check()), torch.cat(weights))


def test_rows_of_one_size_with_other_numbers_of_survivors():
    """Seven codes of 4 bits take as many bytes as eight."""
    grid, parts = Grid(4, 64), []
    for kept in (7, 8):
        weight = torch.zeros(2, 64)
        weight[:, :kept] = 0.5
        parts.append(QuantizedMatrix.of(on_grid(weight, grid), grid))
    found = stack(parts).check()
    assert found.row_start is not None
    assert_same_bits(dense(found), torch.cat([dense(part) for part in parts]))


def test_other_grids_and_values_are_stacked_as_values():
    first, second = quantized(Grid(4, 64)), quantized(Grid(8, 64), seed=1)
    third = make("even", shape=(6, 300), seed=2)
    found = stack([first[1], second[1], PackedMatrix.of(third)])
    assert isinstance(found, PackedMatrix)
    assert_same_bits(dense(found.check()), torch.cat([first[0], second[0], third]))


@grids
@kinds
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_products(grid, kind, tokens, bias, random):
    weight, matrix = quantized(grid, kind)
    x = torch.randn(tokens, 2, 300, generator=random)
    shift = torch.randn(6, generator=random) if bias else None
    product = product_of(matrix)
    assert isinstance(product, QuantizedProduct)
    torch.testing.assert_close(product(x, shift), torch.nn.functional.linear(x, weight, shift), rtol=1e-4, atol=1e-4)


@grids
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks(grid, ranks):
    weight, matrix = quantized(grid, "ragged", shape=(40, 512))
    other, beside = quantized(grid, "even", shape=(40, 512), seed=1)
    rows, columns = [], []
    for rank in range(ranks):
        slot = parameter(80 // ranks, 512)
        load_merged(slot, [StoredWeight(matrix), StoredWeight(beside)], rank)
        rows += slot.matrices("gate_up_proj.weight")
        slot = parameter(40, 512 // ranks)
        load_row_parallel(slot, StoredWeight(matrix), rank)
        columns += slot.matrices("down_proj.weight")
    assert all(isinstance(one, QuantizedMatrix) for one in (*rows, *columns))
    expected = [part for rank in range(ranks) for part in (weight.chunk(ranks)[rank], other.chunk(ranks)[rank])]
    assert_same_bits(torch.cat([as_dense(one) for one in rows]), torch.cat(expected))
    assert_same_bits(torch.cat([as_dense(one) for one in columns], dim=1), weight)


@pytest.mark.parametrize("codec", ["bitmap", "archive"])
def test_weights_of_a_folder(codec, tmp_path):
    source = save_dense(tmp_path / "dense", "llama", torch.bfloat16)
    prune(source, tmp_path / "pruned", calibration={"source": "tokens"}, method="magnitude")
    pack(
        quantize_folder(tmp_path / "pruned", tmp_path / "codes", Grid(4, 64)),
        tmp_path / "packed",
        codec,
        grid=Grid(4, 64),
    )
    shards, found = PackedShards(tmp_path / "packed"), dict(weights_of(tmp_path / "packed"))
    assert any(isinstance(getattr(weight, "matrix", None), QuantizedMatrix) for weight in found.values())
    for name, weight in found.items():
        assert_same_bits(weight.unpacked() if isinstance(weight, StoredWeight) else weight, shards.read(name))


@grids
@kinds
@pytest.mark.parametrize("padding", [0, 58])
def test_a_vocabulary_that_is_filled_up_with_zeros_stays_codes(grid, kind, padding):
    weight, matrix = quantized(grid, kind)
    slot = parameter(6 + padding, 300)
    slot[:6].data.copy_(StoredWeight(matrix))
    slot[6:].data.fill_(0)
    (found,) = slot.data.matrices("table")
    assert isinstance(found, QuantizedMatrix)
    assert_same_bits(dense(found.check()), torch.cat((weight, torch.zeros(padding, 300))))


@kinds
def test_rows_of_tokens(kind, dtype):
    weight, matrix = quantized(Grid(8, 128), kind, dtype)
    tokens = torch.tensor([[5, 0, 5], [2, 3, 1]])
    for each in (matrix, PackedMatrix.of(weight)):
        assert_same_bits(product_of(each).rows_of(tokens), weight[tokens])
