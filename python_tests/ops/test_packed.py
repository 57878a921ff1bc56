"""``packed_linear`` and ``unpack_bitmap`` against their reference, within the bound of csrc/ops/packed.h."""

import pytest
import torch
from helpers import DTYPES, SHAPES, UNIT, assert_same_bits, make_weight, rest_nightly
from torch.nn.functional import linear

from ace_ext import ops
from ace_ext.ops import packed_reference as reference
from ace_ext.ops._packed import register_packed
from ace_ext.packed.matrix import PackedMatrix

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 40, 64, 65, 70)
"""Each kind of block of tokens in the loops, and both sides of the change to panels."""

CPU = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not have it
DENSE_ORDER = bool(
    CPU.get("avx512_bf16")
    and CPU.get("avx512_vbmi2")
    and not CPU.get("amx_bf16")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and "MKL-DNN v3.12" in torch.__config__.show()
)
"""Whether packed_linear's panels run here, and torch's product is the one whose order they follow."""


def make(rows, cols, dtype, random, share=0.5, ragged=False):
    weight = make_weight(rows, cols, dtype, random)
    kept = torch.rand(rows, cols, generator=random)
    if ragged:
        weight[kept < share * torch.linspace(0, 2, rows)[:, None]] = 0.0
        return weight, PackedMatrix.of(weight)
    weight.scatter_(1, kept.argsort(dim=1)[:, round(cols * share) :], 0.0)
    return weight, PackedMatrix.of(weight)


def arguments(matrix):
    return matrix.bitmap, matrix.values, matrix.row_start


def bound(x, weight, bias, exact):
    """The contract's: u |exact| + (cols + 8) 2^-24 (Σ |x W| + |bias|), and nothing below the smallest number."""
    size = x.double().abs() @ weight.double().abs().T
    size += 0.0 if bias is None else bias.double().abs()
    smallest = torch.finfo(x.dtype).smallest_normal * ROUNDING[x.dtype]
    return ROUNDING[x.dtype] * exact.abs() + (x.shape[1] + 8) * UNIT * size + smallest


def check(x, weight, matrix, bias):
    exact = reference.packed_linear(x, *arguments(matrix), bias)
    found = ops.packed_linear(x, *arguments(matrix), bias)
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= bound(x, weight, bias, exact)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (5, 64), (17, 200)])
@pytest.mark.parametrize("ragged", [False, True])
def test_products_are_within_the_bound(shape, ragged, dtype, random):
    weight, matrix = make(*shape, dtype, random, ragged=ragged)
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], generator=random).to(dtype)
        bias = torch.randn(shape[0], generator=random).to(dtype) if tokens % 2 else None
        check(x, weight, matrix, bias)


def test_more_tokens_than_are_multiplied_at_a_time(dtype, random):
    weight, matrix = make(150, 1134, dtype, random, ragged=True)
    for tokens in (257, 600):
        check(torch.randn(tokens, 1134, generator=random).to(dtype), weight, matrix, torch.ones(150, dtype=dtype))


def cancelling(tokens, rows, cols, random):
    """Inputs and weights, half of them 0, whose products cancel: what is left of a sum is its rounding, which another
    order changes in nearly every entry."""
    half = cols // 2
    x = torch.randn(tokens, half, generator=random).bfloat16()
    weight = torch.randn(rows, half, generator=random).bfloat16()
    weight *= torch.rand(rows, half, generator=random) < 0.5
    places = torch.randperm(2 * half, generator=random)
    return torch.cat([x, x], 1)[:, places], torch.cat([weight, -weight], 1)[:, places]


@pytest.mark.skipif(not DENSE_ORDER, reason="needs AVX-512's bf16 instructions, no AMX, and torch with oneDNN 3.12")
@pytest.mark.parametrize("shape", [(192, 576), (100, 1024), (40, 1100), (70, 2112), (17, 8300)])
def test_bfloat16_results_have_the_bits_of_dense_ones(shape, threads, random):
    """From five tokens on; the order in which torch's library adds was found for this version (docs/payoff.md)."""
    threads(2)
    for tokens in (5, 6, 17, 64, 200):
        x, weight = cancelling(tokens, *shape, random)
        matrix = PackedMatrix.of(weight)
        for bias in (None, 1e-3 * torch.randn(shape[0], generator=random).bfloat16()):
            assert_same_bits(ops.packed_linear(x, *arguments(matrix), bias), linear(x, weight, bias))
        few = ops.packed_linear(x[:4], *arguments(matrix))
        assert not torch.equal(few, linear(x[:4], weight))  # in another order: so these inputs show a difference


@pytest.mark.parametrize("share", [0.0, 0.02, 0.98, 1.0])
def test_any_share_of_survivors(share, dtype, random):
    weight, matrix = make(20, 150, dtype, random, share)
    for tokens in (1, 5, 20):
        check(torch.randn(tokens, 150, generator=random).to(dtype), weight, matrix, None)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 1134)])
def test_unpacking_gives_every_bit(shape, dtype, random):
    for ragged in (False, True):
        weight, matrix = make(*shape, dtype, random, ragged=ragged)
        weight.view(-1)[0] = torch.finfo(dtype).tiny / 2  # a subnormal number
        matrix = PackedMatrix.of(weight)
        assert_same_bits(ops.unpack_bitmap(*arguments(matrix), shape[1]), weight)
        if weight.numel() < 3000:
            assert_same_bits(reference.unpack_bitmap(*arguments(matrix), shape[1]), weight)


def test_a_slice_of_a_matrix_as_input(dtype, random):
    weight, matrix = make(33, 100, dtype, random)
    wide = torch.randn(12, 140, generator=random).to(dtype)
    for tokens in (1, 4, 12):
        x = wide[:tokens, 7:107]
        assert torch.equal(
            ops.packed_linear(x, *arguments(matrix)), ops.packed_linear(x.contiguous(), *arguments(matrix))
        )
        check(x, weight, matrix, None)


def test_empty_inputs(dtype):
    matrix = PackedMatrix.of(torch.zeros(3, 70, dtype=dtype))
    assert ops.packed_linear(torch.ones(0, 70, dtype=dtype), *arguments(matrix)).shape == (0, 3)
    none = torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0, 5, dtype=dtype), None
    assert ops.packed_linear(torch.ones(2, 70, dtype=dtype), *none).shape == (2, 0)
    no_columns = torch.zeros(3, 0, dtype=torch.uint8), torch.zeros(3, 0, dtype=dtype), None
    bias = torch.arange(3).to(dtype)
    for tokens in (2, 30):
        found = ops.packed_linear(torch.ones(tokens, 0, dtype=dtype), *no_columns, bias)
        assert torch.equal(found, bias.expand(tokens, 3))


def test_few_tokens_do_not_depend_on_the_number_of_threads(dtype, threads, random):
    _, matrix = make(700, 1134, dtype, random)
    x = torch.randn(5, 1134, generator=random).to(dtype)
    threads(1)
    alone = ops.packed_linear(x, *arguments(matrix))
    for number in (2, 3):
        threads(number)
        assert_same_bits(ops.packed_linear(x, *arguments(matrix)), alone)


def test_gradients_flow_to_input_and_bias(random):
    weight, matrix = make(6, 70, torch.float32, random)
    for tokens in (3, 20):
        x = torch.randn(tokens, 70, generator=random, requires_grad=True)
        bias = torch.randn(6, generator=random, requires_grad=True)
        factor = torch.randn(tokens, 6, generator=random)
        (ops.packed_linear(x, *arguments(matrix), bias) * factor).sum().backward()
        torch.testing.assert_close(x.grad, factor @ weight)
        torch.testing.assert_close(bias.grad, factor.sum(0))


def test_gradients_are_kept_for_what_wants_them_alone(random):
    _, matrix = make(6, 70, torch.float32, random)
    x, bias = torch.randn(3, 70, generator=random), torch.randn(6, generator=random)
    for wanted in ((), (x,), (bias,), (x, bias)):
        for tensor in (x, bias):
            tensor.requires_grad_(any(tensor is one for one in wanted))
        assert ops.packed_linear(x, *arguments(matrix), bias).requires_grad == bool(wanted)
        with torch.no_grad():
            assert not ops.packed_linear(x, *arguments(matrix), bias).requires_grad


@pytest.mark.parametrize("dtype", rest_nightly([torch.bfloat16], DTYPES))
def test_torch_knows_the_ops(dtype, random):
    """``opcheck``: schema, Meta kernel, gradients and tracing, with and without row_start and bias."""
    _, even = make(6, 70, dtype, random)
    _, ragged = make(6, 70, dtype, random, ragged=True)
    x = torch.randn(3, 70, generator=random).to(dtype)
    bias = torch.randn(6, generator=random).to(dtype)
    register_packed()
    for matrix in (even, ragged):
        torch.library.opcheck(torch.ops.ace_ext.unpack_bitmap.default, (*arguments(matrix), 70))
        for given in (None, bias):
            torch.library.opcheck(torch.ops.ace_ext.packed_linear.default, (x, *arguments(matrix), given))
    wants = (x.requires_grad_(), *arguments(even), bias.requires_grad_())
    torch.library.opcheck(torch.ops.ace_ext.packed_linear.default, wants)


def test_wrong_counts_read_nothing_outside(dtype):
    """Bits and row_start that claim more survivors than exist: wrong results, but no crash."""
    bitmap = torch.full((4, 16), 255, dtype=torch.uint8)
    for starts in ([0, 1, 2, 3, 4], [0, 2**40, -(2**40), 3, 1], [2**62] * 5):
        values = torch.ones(4, dtype=dtype)
        for tokens in (1, 20):
            ops.packed_linear(torch.ones(tokens, 128, dtype=dtype), bitmap, values, torch.tensor(starts))
        ops.unpack_bitmap(bitmap, values, torch.tensor(starts), 128)
    ops.packed_linear(torch.ones(1, 128, dtype=dtype), bitmap, torch.ones(4, 1, dtype=dtype))


REFUSED = [
    ({"x": torch.ones(5)}, "x must have 2 dimensions"),
    ({"x": torch.ones(2, 5).double()}, "x must be float32, float16 or bfloat16"),
    ({"x": torch.ones(2, 65)}, r"bitmap must have shape \[2, 16\]"),
    ({"bitmap": torch.zeros(2, 8)}, "bitmap must be"),
    ({"bitmap": torch.zeros(3, 8).byte()}, r"values must be \[rows, k\]"),
    ({"values": torch.ones(2, 3).half()}, "values must have the dtype of x"),
    ({"values": torch.ones(6)}, r"values must be \[rows, k\]"),
    ({"values": torch.ones(3, 2).t()}, "values must be contiguous"),
    ({"row_start": torch.zeros(3).long()}, "values must have 1 dimension with row_start"),
    ({"values": torch.ones(6), "row_start": torch.zeros(2).long()}, "row_start must have shape"),
    ({"values": torch.ones(6), "row_start": torch.zeros(3)}, "row_start must be"),
    ({"bias": torch.ones(3)}, "bias must have shape"),
    ({"bias": torch.ones(2).half()}, "bias must be"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_wrong_arguments_are_refused(changed, words):
    good = {"x": torch.ones(2, 5), "bitmap": torch.zeros(2, 8).byte(), "values": torch.ones(2, 3)}
    assert ops.packed_linear(**good).shape == (2, 2)
    with pytest.raises(ValueError, match=f"^packed_linear: {words}"):
        ops.packed_linear(**good | changed)
