"""Cutting, stacking and multiplying packed matrices for servers."""

import pytest
import torch
from helpers import DTYPES, assert_same_bits

from ace_ext.packed.files import dense
from ace_ext.packed.matrix import PackedMatrix
from ace_ext.serving.matrices import cut_columns, cut_rows, stack
from ace_ext.serving.product import DenseProduct, PackedProduct, product_of

SHAPE = (6, 200)


def make(kind: str, dtype=torch.float32, seed=0, shape=SHAPE) -> torch.Tensor:
    """A pruned weight: ``even`` rows have equally many survivors, ``ragged`` ones do not, ``sparse`` has empty rows."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    if kind == "even":
        places = torch.rand(shape, generator=random).argsort(dim=1)[:, : shape[1] // 2]
        return weight.scatter(1, places, 0.0).to(dtype)
    shares = torch.linspace(0, 0.9, shape[0])[:, None]
    return weight.mul(torch.rand(shape, generator=random) < shares).to(dtype)


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("rows", [(0, 6), (2, 5), (5, 6), (3, 3)])
def test_rows(kind, rows, dtype):
    weight = make(kind, dtype)
    matrix = PackedMatrix.of(weight)
    assert (matrix.row_start is None) == (kind == "even")
    found = cut_rows(matrix, *rows).check()
    assert_same_bits(dense(found), weight[slice(*rows)])


@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("cols", [(0, 200), (0, 64), (64, 200), (1, 63), (37, 101), (199, 200), (7, 7)])
def test_columns_at_any_bit(kind, cols, dtype):
    weight = make(kind, dtype)
    found = cut_columns(PackedMatrix.of(weight), *cols).check()
    assert found.cols == cols[1] - cols[0]
    assert_same_bits(dense(found), weight[:, slice(*cols)].contiguous())


def test_columns_of_a_pattern_stay_even():
    weight = torch.ones(4, 256)
    weight[:, 1::2] = 0
    assert cut_columns(PackedMatrix.of(weight), 128, 256).row_start is None


@pytest.mark.parametrize(
    ("kinds", "even"),
    [(["even"], True), (["even", "even"], True), (["even", "ragged"], False), (["ragged"] * 3, False)],
)
def test_stacks(kinds, even, dtype):
    weights = [make(kind, dtype, seed) for seed, kind in enumerate(kinds)]
    found = stack([PackedMatrix.of(weight) for weight in weights]).check()
    assert (found.row_start is None) == even
    assert_same_bits(dense(found), torch.cat(weights))


def test_rows_with_other_numbers_of_survivors_are_stacked_as_ragged_rows():
    one, other = make("even"), torch.where(make("even", seed=1) > 0.5, 1.0, 0.0)
    other = torch.zeros(6, 200).index_fill(1, torch.arange(20), 2.0)
    matrices = [PackedMatrix.of(one), PackedMatrix.of(other)]
    assert [matrix.row_start is None for matrix in matrices] == [True, True]
    assert_same_bits(dense(stack(matrices).check()), torch.cat([one, other]))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("kind", ["even", "ragged"])
@pytest.mark.parametrize("bias", [True, False])
def test_products(kind, tokens, bias, random):
    weight = make(kind)
    x = torch.randn(tokens, 2, 200, generator=random)
    given = torch.randn(6, generator=random) if bias else None
    packed, other = product_of(PackedMatrix.of(weight)), product_of(weight)
    assert isinstance(packed, PackedProduct)
    assert isinstance(other, DenseProduct)
    expected = torch.nn.functional.linear(x, weight, given)
    torch.testing.assert_close(packed(x, given), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(x, given), expected, rtol=1e-5, atol=1e-5)
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)  # columns are not contiguous
    torch.testing.assert_close(packed(turned, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_product_needs_one_graph_for_any_number_of_tokens(dtype, random):
    product = product_of(PackedMatrix.of(make("ragged", dtype)))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(product, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 3, 17):
        x = torch.randn(tokens, 200, generator=random).to(dtype)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same_bits(compiled(x), product(x))
    assert len(graphs) == 1
