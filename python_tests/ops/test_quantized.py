"""``quantized_linear`` and ``unpack_quantized`` against their reference, within the bound of csrc/ops/quantized.h."""

import pytest
import torch
from helpers import DTYPES, SHAPES, UNIT, assert_same_bits, input_rounding, rest_nightly

from ace_ext import ops
from ace_ext.ops import packed_reference as reference
from ace_ext.ops._packed import register_packed

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TOKENS = (1, 2, 3, 4, 5, 7, 16, 17, 40)
"""Each kind of block of tokens in the loops, and both sides of the changes to panels."""

pytestmark = pytest.mark.parametrize("bits", [8, 4])


def codes_of(rows, bits, ragged):
    """``codes`` and ``row_start`` of lists of two's complement codes."""
    packed = []
    for row in rows:
        stored = [code & (1 << bits) - 1 for code in row]
        if bits == 4:
            stored.append(0)
            stored = [low | high << 4 for low, high in zip(stored[0::2], stored[1::2], strict=False)]
        packed.append(torch.tensor(stored, dtype=torch.uint8))
    if not ragged:
        return torch.stack(packed), None
    return torch.cat(packed), torch.tensor([0, *map(len, packed)]).cumsum(0)


def make(rows, cols, dtype, bits, group, random, share=0.5, ragged=False):
    """Arguments of a random matrix: bitmap, codes, scales, bits, group, row_start. All codes occur, also 0."""
    kept = torch.rand(rows, cols, generator=random)
    if ragged:
        mask = kept < share * torch.linspace(0, 2, rows)[:, None]
    else:
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        mask.scatter_(1, kept.argsort(dim=1)[:, : round(cols * share)], value=True)
    dense = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, cols), generator=random)
    bytes_of = torch.zeros(rows, 8 * -(-cols // 64), 8, dtype=torch.bool)
    bytes_of.view(rows, -1)[:, :cols] = mask
    bitmap = (bytes_of * 2 ** torch.arange(8)).sum(2).to(torch.uint8)
    codes, row_start = codes_of([dense[i, mask[i]].tolist() for i in range(rows)], bits, ragged)
    scales = (0.5 + torch.rand(rows, -(-cols // group), generator=random)).to(dtype) / 64
    return bitmap, codes, scales, bits, group, row_start


def bound(x, arguments, bias, exact):
    """The contract's: u |exact| + (cols + groups + 8) 2^-24 (Σ |x W| + |bias|) + Σ d |W|, and the smallest number."""
    scales, group, cols = arguments[2], arguments[4], x.shape[1]
    weight = reference.exact_weight(*arguments, cols).abs().T
    size = x.double().abs() @ weight
    size += 0.0 if bias is None else bias.double().abs()
    smallest = torch.finfo(x.dtype).smallest_normal * ROUNDING[x.dtype]
    rounding = ROUNDING[x.dtype] * exact.abs() + (cols + scales.shape[1] + 8) * UNIT * size
    return rounding + input_rounding(x, group) @ weight + smallest


def check(x, arguments, bias=None):
    exact = reference.quantized_linear(x, *arguments, bias)
    found = ops.quantized_linear(x, *arguments, bias)
    assert found.dtype == x.dtype
    assert ((found.double() - exact).abs() <= bound(x, arguments, bias, exact)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (5, 64), (17, 200), (3, 449)])
@pytest.mark.parametrize("ragged", [False, True])
def test_products_are_within_the_bound(shape, ragged, dtype, bits, random):
    for number, group in enumerate((64, 128, 192, 2048)):
        arguments = make(*shape, dtype, bits, group, random, ragged=ragged)
        for tokens in TOKENS[number % 2 :: 2]:
            x = torch.randn(tokens, shape[1], generator=random).to(dtype)
            check(x, arguments, torch.randn(shape[0], generator=random).to(dtype) if tokens % 2 else None)


def test_more_tokens_than_are_multiplied_at_a_time(dtype, bits, random):
    arguments = make(150, 1134, dtype, bits, 128, random, ragged=True)
    for tokens in (257, 600):
        check(torch.randn(tokens, 1134, generator=random).to(dtype), arguments, torch.ones(150, dtype=dtype))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.98, 1.0])
def test_any_share_of_survivors(share, dtype, bits, random):
    arguments = make(20, 330, dtype, bits, 128, random, share)
    for tokens in (1, 4, 5, 20):
        check(torch.randn(tokens, 330, generator=random).to(dtype), arguments)


def test_inputs_of_all_magnitudes(dtype, bits, random):
    """Outliers, spans of zeros, and the smallest and largest numbers for which nothing over- or underflows."""
    arguments = make(20, 520, dtype, bits, 128, random)
    for least, most in ((-6, 5), (-14, 5), (-14, -8), (-60, -30), (-120, 80), (60, 80)):
        if dtype == torch.float16 and (least < -14 or most > 5):
            continue
        x = torch.randn(16, 520, generator=random)
        x *= torch.exp2(torch.randint(least, most, x.shape, generator=random).float())
        x[:, 128:256] = 0.0
        x[::2, 300] = 2.0**most
        for tokens in (1, 2, 4, 16):
            check(x[:tokens].to(dtype), arguments)


def test_inputs_of_like_magnitude_are_not_rounded(bits, random):
    """Numbers of bfloat16 of at least 1/64 of the largest: the bound without their rounding."""
    arguments = make(20, 520, torch.bfloat16, bits, 64, random)
    x = torch.exp2(6 * torch.rand(4, 520, generator=random)).bfloat16().clamp(max=63) * 2.0**-9
    x *= torch.randint(0, 2, x.shape, generator=random) * 2 - 1
    for tokens in (1, 2, 4):
        exact = reference.quantized_linear(x[:tokens], *arguments)
        found = ops.quantized_linear(x[:tokens], *arguments)
        allowed = ROUNDING[torch.bfloat16] * exact.abs() + bound(x[:tokens].float(), arguments, None, exact)
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_inputs_that_are_not_finite_stay_visible(wrong, dtype, bits, random):
    """Where the weight is not 0. Other tokens do not change."""
    arguments = make(20, 330, dtype, bits, 128, random)
    weight = reference.exact_weight(*arguments, 330)
    for tokens in (1, 2, 4, 7, 20):
        x = torch.randn(tokens, 330, generator=random).to(dtype)
        x[tokens // 2, 200] = wrong
        found = ops.quantized_linear(x, *arguments)
        assert not found[tokens // 2, weight[:, 200] != 0].isfinite().any()
        others = torch.arange(tokens) != tokens // 2
        assert found[others].isfinite().all()


def test_long_rows(dtype, bits, random):
    """Rows of several parts of a panel, which end inside a byte of codes, and groups of several runs."""
    for group in (128, 3072):
        arguments = make(3, 8300, dtype, bits, group, random, ragged=True)
        for tokens in (1, 6):
            check(torch.randn(tokens, 8300, generator=random).to(dtype), arguments)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 1134)])
def test_unpacking_gives_every_bit(shape, dtype, bits, random):
    for ragged in (False, True):
        for group in (64, 128, 320):
            arguments = make(*shape, dtype, bits, group, random, ragged=ragged)
            arguments[2].view(-1)[0] = torch.finfo(dtype).tiny / 8  # a subnormal number
            found = ops.unpack_quantized(*arguments, shape[1])
            assert_same_bits(found, reference.unpack_quantized(*arguments, shape[1]))


def test_every_code(dtype, bits):
    """One token per column reads each weight alone, without rounding: on every path all codes are exact."""
    codes = list(range(-(1 << bits - 1), 1 << bits - 1))
    bitmap = torch.full((2, 8 * max(1, len(codes) // 64)), 255, dtype=torch.uint8)
    bitmap[:, len(codes) // 8 :] = 0
    scales = torch.ones(2, -(-len(codes) // 64), dtype=dtype)
    arguments = bitmap, codes_of([codes, codes[::-1]], bits, ragged=False)[0], scales, bits, 64, None
    expected = torch.tensor([codes, codes[::-1]]).to(dtype)
    assert torch.equal(ops.unpack_quantized(*arguments, len(codes)), expected)
    unit = torch.eye(len(codes), dtype=dtype)
    assert torch.equal(ops.quantized_linear(unit, *arguments).T, expected)
    for x in unit.split(4):
        assert torch.equal(ops.quantized_linear(x, *arguments), x @ expected.T)


def test_a_slice_of_a_matrix_as_input(dtype, bits, random):
    arguments = make(33, 100, dtype, bits, 64, random)
    wide = torch.randn(12, 140, generator=random).to(dtype)
    for tokens in (1, 4, 12):
        x = wide[:tokens, 7:107]
        assert torch.equal(ops.quantized_linear(x, *arguments), ops.quantized_linear(x.contiguous(), *arguments))
        check(x, arguments)


def test_empty_inputs(dtype, bits):
    bitmap, codes = torch.zeros(3, 16, dtype=torch.uint8), torch.zeros(3, 0, dtype=torch.uint8)
    scales = torch.ones(3, 2, dtype=dtype)
    arguments = bitmap, codes, scales, bits, 64, None
    assert ops.quantized_linear(torch.ones(0, 70, dtype=dtype), *arguments).shape == (0, 3)
    assert torch.equal(ops.quantized_linear(torch.ones(2, 70, dtype=dtype), *arguments), torch.zeros(2, 3, dtype=dtype))
    no_rows = bitmap[:0], codes[:0], scales[:0], bits, 64, None
    assert ops.quantized_linear(torch.ones(2, 70, dtype=dtype), *no_rows).shape == (2, 0)
    no_columns = bitmap[:, :0].contiguous(), codes, scales[:, :0].contiguous(), bits, 64, None
    bias = torch.arange(3).to(dtype)
    for tokens in (2, 30):
        found = ops.quantized_linear(torch.ones(tokens, 0, dtype=dtype), *no_columns, bias)
        assert torch.equal(found, bias.expand(tokens, 3))
    assert ops.unpack_quantized(*no_columns, 0).shape == (3, 0)


def test_few_tokens_do_not_depend_on_the_number_of_threads(dtype, bits, threads, random):
    arguments = make(300, 1134, dtype, bits, 128, random)
    x = torch.randn(5, 1134, generator=random).to(dtype)
    threads(1)
    alone = ops.quantized_linear(x, *arguments)
    for number in (2, 3):
        threads(number)
        assert_same_bits(ops.quantized_linear(x, *arguments), alone)


def test_gradients_flow_to_input_and_bias(bits, random):
    arguments = make(6, 70, torch.float32, bits, 64, random)
    weight = reference.unpack_quantized(*arguments, 70)
    for tokens in (3, 20):
        x = torch.randn(tokens, 70, generator=random, requires_grad=True)
        bias = torch.randn(6, generator=random, requires_grad=True)
        factor = torch.randn(tokens, 6, generator=random)
        (ops.quantized_linear(x, *arguments, bias) * factor).sum().backward()
        torch.testing.assert_close(x.grad, factor @ weight)
        torch.testing.assert_close(bias.grad, factor.sum(0))


@pytest.mark.parametrize("dtype", rest_nightly([torch.bfloat16], DTYPES))
def test_torch_knows_the_ops(dtype, bits, random):
    """``opcheck``: schema, Meta kernel, gradients and tracing, with and without row_start and bias."""
    x = torch.randn(3, 70, generator=random).to(dtype)
    bias = torch.randn(6, generator=random).to(dtype)
    register_packed()
    for ragged in (False, True):
        arguments = make(6, 70, dtype, bits, 64, random, ragged=ragged)
        torch.library.opcheck(torch.ops.ace_ext.unpack_quantized.default, (*arguments, 70))
        for given in (None, bias):
            torch.library.opcheck(torch.ops.ace_ext.quantized_linear.default, (x, *arguments, given))
    wants = (x.requires_grad_(), *arguments, bias.requires_grad_())
    torch.library.opcheck(torch.ops.ace_ext.quantized_linear.default, wants)


def test_wrong_counts_read_nothing_outside(dtype, bits):
    """Bits and row_start that claim more survivors than exist: wrong results, but no crash."""
    bitmap = torch.full((4, 16), 255, dtype=torch.uint8)
    scales = torch.ones(4, 2, dtype=dtype)
    for starts in ([0, 1, 2, 3, 4], [0, 2**40, -(2**40), 3, 1], [2**62] * 5):
        codes = torch.ones(4, dtype=torch.uint8)
        for tokens in (1, 5, 20):
            x = torch.ones(tokens, 128, dtype=dtype)
            ops.quantized_linear(x, bitmap, codes, scales, bits, 64, torch.tensor(starts))
        ops.unpack_quantized(bitmap, codes, scales, bits, 64, torch.tensor(starts), 128)
    ops.quantized_linear(torch.ones(1, 128, dtype=dtype), bitmap, codes.view(4, 1), scales, bits, 64)


REFUSED = [
    ({"x": torch.ones(5)}, "x must have 2 dimensions"),
    ({"x": torch.ones(2, 5).double()}, "x must be float32, float16 or bfloat16"),
    ({"x": torch.ones(2, 5).half()}, "scales must have the dtype of x"),
    ({"x": torch.ones(2, 10)[:, ::2]}, "x must have contiguous columns"),
    ({"x": torch.ones(2, 65)}, r"bitmap must have shape \[2, 16\]"),
    ({"bitmap": torch.zeros(2, 8)}, "bitmap must be"),
    ({"bitmap": torch.zeros(8, 2).byte().t()}, "bitmap must be contiguous"),
    ({"bitmap": torch.zeros(3, 8).byte()}, r"codes must be \[rows, k\]"),
    ({"codes": torch.ones(2, 3)}, "codes must be uint8"),
    ({"codes": torch.ones(2, 3).char()}, "codes must be uint8"),
    ({"codes": torch.ones(6).byte()}, r"codes must be \[rows, k\]"),
    ({"codes": torch.ones(3, 2).byte().t()}, "codes must be contiguous"),
    ({"scales": torch.ones(2, 1).double()}, "scales must be float32, float16 or bfloat16"),
    ({"scales": torch.ones(2, 2)}, r"scales must have shape \[2, 1\]"),
    ({"scales": torch.ones(2)}, r"scales must have shape \[2, 1\]"),
    ({"group": 0}, "group must be a multiple of 64"),
    ({"group": 96}, "group must be a multiple of 64"),
    ({"group": -64}, "group must be a multiple of 64"),
    ({"group": 2**62}, "group must be a multiple of 64"),
    ({"row_start": torch.zeros(3).long()}, "codes must have 1 dimension with row_start"),
    ({"codes": torch.ones(6).byte(), "row_start": torch.zeros(2).long()}, "row_start must have shape"),
    ({"codes": torch.ones(6).byte(), "row_start": torch.zeros(3)}, "row_start must be"),
    ({"bias": torch.ones(3)}, "bias must have shape"),
    ({"bias": torch.ones(2).half()}, "bias must be"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_wrong_arguments_are_refused(changed, words, bits):
    good = {"x": torch.ones(2, 5), "bitmap": torch.zeros(2, 8).byte(), "codes": torch.ones(2, 3).byte()}
    good |= {"scales": torch.ones(2, 1), "bits": bits, "group": 64}
    assert ops.quantized_linear(**good).shape == (2, 2)
    with pytest.raises(ValueError, match=f"^quantized_linear: {words}"):
        ops.quantized_linear(**good | changed)


def test_other_sizes_of_codes_are_refused(bits):
    empty = torch.zeros(2, 8).byte()
    for wrong in (0, 3, bits + 1, -bits, 2**40):
        with pytest.raises(ValueError, match=r"^unpack_quantized: bits must be 8 or 4"):
            ops.unpack_quantized(empty, empty[:, :0].contiguous(), torch.ones(2, 1), wrong, 64, None, 5)


def test_one_graph_serves_any_number_of_tokens(bits, random):
    arguments = make(6, 70, torch.float32, bits, 64, random)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: ops.quantized_linear(x, *arguments), fullgraph=True, backend=count)
    for tokens in (3, 5, 20):
        x = torch.randn(tokens, 70, generator=random)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), ops.quantized_linear(x, *arguments))
    assert len(graphs) == 1
