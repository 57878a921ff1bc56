"""Every op on a CUDA device, against the CPU back end and float64 sums.

Skipped, with the reason, without a device or a CUDA build: then nothing here has been run on a GPU.
"""

import subprocess
import sys

import pytest
import torch
from helpers import (
    DTYPES,
    FORMULAS,
    UNIT,
    assert_only_slice_changed,
    assert_same_bits,
    embed,
    formula_arguments,
    inverse_square_norm_bound,
    make_weight,
    moment_bounds,
    places,
    prune_at_,
    score_histogram,
)
from ops.test_packed import arguments as packed_arguments
from ops.test_packed import bound as packed_bound
from ops.test_packed import make as make_packed

from ace_ext import build_info, ops
from ace_ext.ops import ScoredWeight, packed_reference
from ace_ext.ops._across import RADIX_BITS
from ace_ext.ops._extension import compiled
from ace_ext.packed.matrix import pack_bits
from ace_ext.pruning.gram import GramState


def _missing() -> str | None:
    if build_info()["cuda"] is None:
        return "not run on a GPU: ace_ext was built without CUDA"
    return None if torch.cuda.is_available() else "not run on a GPU: torch finds no CUDA device"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_missing() is not None, reason=_missing() or "")]

SHAPES = ((1, 1), (2, 1), (31, 33), (32, 32), (33, 31), (3, 129), (2, 1134), (65, 4096), (3, 28672), (2, 130001))


def on_gpu(arguments: dict) -> dict:
    return {name: value.cuda() for name, value in arguments.items()}


@pytest.fixture(autouse=True)
def no_flag_left():
    """Each test starts with a clear flag and must leave one."""
    compiled().take_not_finite(torch.cuda.current_device())
    yield
    assert compiled().take_not_finite(torch.cuda.current_device()) == ""


def matrices(rows, cols, dtype, random, formula, ties):
    weight = make_weight(rows, cols, dtype, random, ties)
    return weight, formula_arguments(formula, weight, random, ties)


# Packed matrices


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:8])
def test_packed_products_and_unpacking(shape, ragged, dtype, random):
    weight, matrix = make_packed(*shape, dtype, random, ragged=ragged)
    place = [None if part is None else part.cuda() for part in packed_arguments(matrix)]
    assert_same_bits(ops.unpack_bitmap(*place, shape[1]).cpu(), weight)
    for tokens in (1, 2, 7, 16, 17, 40):
        x = torch.randn(tokens, shape[1], generator=random).to(dtype)
        bias = torch.randn(shape[0], generator=random).to(dtype) if tokens % 2 else None
        exact = packed_reference.packed_linear(x, *packed_arguments(matrix), bias)
        found = ops.packed_linear(x.cuda(), *place, None if bias is None else bias.cuda()).cpu()
        assert ((found.double() - exact).abs() <= packed_bound(x, weight, bias, exact)).all()


def pack_codes(codes, bits):
    """The bytes of a row's codes: two's complement, two of 4 bits in a byte, the lower half first."""
    stored = codes & ((1 << bits) - 1)
    if bits == 4:
        stored = torch.nn.functional.pad(stored, (0, len(stored) % 2))
        stored = stored[::2] | stored[1::2] << 4
    return stored.to(torch.uint8)


def make_quantized(rows, cols, bits, group, dtype, random, ragged):
    """The arguments of ``unpack_quantized`` but for the columns, of a matrix of which about half is stored."""
    order = torch.rand(rows, cols, generator=random)
    kept = order < 0.5 if ragged else order.argsort(dim=1).argsort(dim=1) < (cols + 1) // 2
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, cols), generator=random)
    scales = torch.rand(rows, -(-cols // group), generator=random).to(dtype)
    lines = [pack_codes(line[mask], bits) for line, mask in zip(codes, kept, strict=True)]
    row_start = torch.tensor([0, *map(len, lines)]).cumsum(0) if ragged else None
    stored = torch.cat(lines) if ragged else torch.stack(lines)
    return pack_bits(kept), stored, scales, bits, group, row_start


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 192), (4, 128), (4, 1024)])
@pytest.mark.parametrize("shape", SHAPES[:8])
def test_quantized_products_and_unpacking(shape, bits, group, ragged, dtype, random):
    matrix = make_quantized(*shape, bits, group, dtype, random, ragged)
    *place, row_start = [part.cuda() if isinstance(part, torch.Tensor) else part for part in matrix]
    rounded = packed_reference.unpack_quantized(*matrix, shape[1])
    assert_same_bits(ops.unpack_quantized(*place, row_start, shape[1]).cpu(), rounded)
    weight = packed_reference.exact_weight(*matrix, shape[1])
    for tokens in (1, 2, 7, 16, 17, 40):
        x = torch.randn(tokens, shape[1], generator=random).to(dtype)
        bias = torch.randn(shape[0], generator=random).to(dtype) if tokens % 2 else None
        shift = torch.zeros(1) if bias is None else bias
        found = ops.quantized_linear(x.cuda(), *place, row_start, None if bias is None else bias.cuda()).cpu()
        used = weight if tokens <= 16 else rounded  # more tokens are multiplied with the unpacked matrix
        exact = x.double() @ used.double().T + shift.double()
        bound = packed_bound(x, used, bias, exact)
        bound += matrix[2].shape[1] * UNIT * (x.double().abs() @ used.double().abs().T + shift.double().abs())
        assert ((found.double() - exact).abs() <= bound).all()


# Scores and masks: the CPU's bits


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES[:8])
def test_scores_have_the_cpu_bits(shape, formula, dtype, random):
    weight, arguments = matrices(*shape, dtype, random, formula, ties=False)
    expected = ops.score(weight, formula, **arguments)
    assert_same_bits(ops.score(weight.cuda(), formula, **on_gpu(arguments)).cpu(), expected)


@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_equals_the_cpu(shape, formula, group, ties, dtype, random):
    weight, arguments = matrices(*shape, dtype, random, formula, ties)
    size = weight.shape[1] if group == "row" else weight.numel()
    for keep_k in places(size):
        expected, actual = weight.clone(), weight.cuda()
        threshold = ops.prune_topk_(expected, formula, keep_k, group=group, **arguments)
        got = ops.prune_topk_(actual, formula, keep_k, group=group, **on_gpu(arguments))
        assert_same_bits(actual.cpu(), expected)
        assert_same_bits(got.cpu(), threshold)
        mask = ops.topk_mask(weight, formula, keep_k, group=group, **arguments)
        assert torch.equal(ops.topk_mask(weight.cuda(), formula, keep_k, group=group, **on_gpu(arguments)).cpu(), mask)


@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
@pytest.mark.parametrize("group_m", [1, 2, 3, 4, 8, 12, 16, 31, 32])
def test_nm_equals_the_cpu(group_m, ties, dtype, random):
    for formula in FORMULAS:
        weight, arguments = matrices(5, group_m * 37, dtype, random, formula, ties)
        for keep_n in places(group_m):
            expected, actual = weight.clone(), weight.cuda()
            ops.prune_nm_(expected, formula, keep_n, group_m, **arguments)
            ops.prune_nm_(actual, formula, keep_n, group_m, **on_gpu(arguments))
            assert_same_bits(actual.cpu(), expected)
            mask = ops.nm_mask(weight, formula, keep_n, group_m, **arguments)
            got = ops.nm_mask(weight.cuda(), formula, keep_n, group_m, **on_gpu(arguments))
            assert torch.equal(got.cpu(), mask)


@pytest.mark.parametrize("score_dtype", DTYPES)
def test_own_scores_equal_the_cpu(score_dtype, dtype, random):
    weight, score = make_weight(9, 128, dtype, random), make_weight(9, 128, score_dtype, random, ties=True)
    for group, keep_k in (("row", 50), ("matrix", 500)):
        expected, actual = weight.clone(), weight.cuda()
        moment = score.float()
        ops.prune_topk_(expected, "score", keep_k, moment=moment, group=group)
        ops.prune_topk_(actual, "score", keep_k, moment=moment.cuda(), group=group)
        assert_same_bits(actual.cpu(), expected)
    expected, actual = weight.clone(), weight.cuda()
    ops.prune_nm_(expected, "score", 2, 4, moment=score.float())
    ops.prune_nm_(actual, "score", 2, 4, moment=score.float().cuda())
    assert_same_bits(actual.cpu(), expected)


def test_histograms_and_cuts_equal_the_cpu(dtype, random):
    weight, arguments = matrices(70, 300, dtype, random, "ria", ties=False)
    prefix, want = 0, 9000
    shift = 32
    for level, width in enumerate(RADIX_BITS):
        shift -= width
        counts = score_histogram(weight, "ria", prefix, level, **arguments)
        got = score_histogram(weight.cuda(), "ria", prefix, level, **on_gpu(arguments))
        assert torch.equal(got.cpu(), counts)
        above = counts.flip(0).cumsum(0).flip(0)
        digit = int((above >= want).nonzero().max())
        want -= int(above[digit] - counts[digit])
        prefix |= digit << shift
    expected, actual = weight.clone(), weight.cuda()
    prune_at_(expected, "ria", prefix, want, **arguments)
    prune_at_(actual, "ria", prefix, want, **on_gpu(arguments))
    assert_same_bits(actual.cpu(), expected)
    assert int((actual != 0).sum()) == 9000


def test_topk_across_equals_the_cpu(random):
    weights = [make_weight(70, cols, dtype, random, ties=True) for cols, dtype in zip((300, 8, 1), DTYPES, strict=True)]
    on_device = [weight.cuda() for weight in weights]
    for each in (weights, on_device):
        ops.prune_topk_across_([ScoredWeight(weight, "magnitude") for weight in each], 9001)
    for actual, expected in zip(on_device, weights, strict=True):
        assert_same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("cols", [64, 61])
def test_column_slices(cols, dtype, random):
    weight, arguments = matrices(17, cols, dtype, random, "cosp", ties=False)
    expected = weight.clone()
    ops.prune_topk_(expected, "cosp", cols // 2, **arguments)
    outer, view = embed(weight.cuda())
    ops.prune_topk_(view, "cosp", cols // 2, **on_gpu(arguments))
    assert_same_bits(view.cpu(), expected)
    assert_only_slice_changed(outer, view)


def test_empty_matrices(dtype):
    for shape in ((0, 8), (3, 0)):
        weight = torch.empty(shape, dtype=dtype, device="cuda")
        assert ops.prune_topk_(weight, "magnitude", 0).shape == (shape[0],)
        assert ops.prune_topk_(weight, "magnitude", 0, group="matrix").shape == (1,)
        ops.prune_nm_(weight, "magnitude", 2, 4)


# Solvers: the CPU's bits


def solver_inputs(rows, cols, dtype, random, keep_n, group_m):
    """A weight, a Gram matrix and a mask of the pattern, or of half of each row."""
    weight, x = make_weight(rows, cols, dtype, random), torch.randn(2 * cols, cols, generator=random)
    mask = weight.float().clone()
    if group_m:
        ops.prune_nm_(mask, "magnitude", keep_n, group_m)
    else:
        ops.prune_topk_(mask, "magnitude", cols // 2)
    return weight, x.T @ x, mask != 0


@pytest.mark.parametrize(("keep_n", "group_m"), [(0, 0), (2, 4), (3, 8), (16, 32)])
@pytest.mark.parametrize("shape", [(1, 32), (33, 288), (7, 1152)])
def test_swaps_equal_the_cpu(shape, keep_n, group_m, dtype, random):
    weight, gram, expected = solver_inputs(*shape, dtype, random, keep_n, group_m)
    actual = expected.cuda()
    swaps = ops.refine_swaps_(expected, weight, gram, keep_n, group_m)
    got = ops.refine_swaps_(actual, weight.cuda(), gram.cuda(), keep_n, group_m)
    assert torch.equal(got.cpu(), swaps)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize(("keep_n", "group_m"), [(0, 0), (2, 4), (3, 8), (16, 32)])
@pytest.mark.parametrize("shape", [(1, 32), (33, 288), (1000, 96), (7, 1152)])
def test_balancing_equals_the_cpu(shape, keep_n, group_m, dtype, random):
    weight, gram, expected = solver_inputs(*shape, dtype, random, keep_n, group_m)
    variance, mean = gram.diagonal().contiguous(), torch.randn(shape[1], generator=random)
    actual = expected.cuda()
    swaps = ops.balance_mean_(expected, weight, variance, mean, group_m, 3)
    got = ops.balance_mean_(actual, weight.cuda(), variance.cuda(), mean.cuda(), group_m, 3)
    assert torch.equal(got.cpu(), swaps)
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("shape", [(1, 32), (33, 288), (1000, 96), (7, 1152)])
def test_restoring_equals_the_cpu(shape, random):
    expected, gram, mask = solver_inputs(*shape, torch.float32, random, 0, 0)
    mean = torch.randn(shape[1], generator=random)
    direction, actual = mean / gram.diagonal(), expected.cuda()
    ops.restore_mean_(expected, mask, mean, direction)
    ops.restore_mean_(actual, mask.cuda(), mean.cuda(), direction.cuda())
    assert_same_bits(actual.cpu(), expected)


@pytest.mark.parametrize(("keep_n", "group_m"), [(0, 0), (2, 4), (3, 8), (16, 32)])
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (1000, 128), (7, 288)])
def test_obs_equals_the_cpu(shape, keep_n, group_m, random):
    weight, gram, mask = solver_inputs(*shape, torch.float32, random, keep_n, group_m)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float().contiguous()
    expected = (weight.clone(), torch.zeros_like(weight), mask.clone())
    actual = tuple(t.cuda() for t in expected)
    ops.obs_block_(*expected, factor, keep_n, group_m)
    ops.obs_block_(*actual, factor.cuda(), keep_n, group_m)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (1000, 128), (7, 288)])
def test_quantizing_equals_the_cpu(shape, descends, bits, dtype, random):
    weight, gram, mask = solver_inputs(*shape, torch.float32, random, 0, 0)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram.double()), upper=True).float().contiguous()
    scale = (weight.abs().amax(1) / 2 ** (bits - 1)).to(dtype)
    current = torch.randn(shape, generator=random) if descends else None
    expected = (weight.clone(), torch.zeros_like(weight))
    actual = tuple(t.cuda() for t in expected)
    ops.quantize_block_(*expected, mask, scale, factor, bits, current)
    moved = None if current is None else current.cuda()
    ops.quantize_block_(*actual, mask.cuda(), scale.cuda(), factor.cuda(), bits, moved)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_solvers_leave_alone_what_they_cannot_use(random):
    device = torch.cuda.current_device()
    weight, gram, mask = (t.cuda() for t in solver_inputs(8, 64, torch.float32, random, 2, 4))
    error, factor = torch.zeros_like(weight), torch.eye(64, device="cuda")
    weight[5, 7] = float("nan")
    before, masks = weight.clone(), mask.clone()
    swaps = ops.refine_swaps_(mask, weight, gram, 2, 4)
    assert compiled().take_not_finite(device) == "refine_swaps_"
    assert (swaps == -1).tolist() == [i == 5 for i in range(8)]
    assert torch.equal(mask[5], masks[5])
    swaps = ops.balance_mean_(mask, weight, gram.diagonal().contiguous(), gram[0].contiguous(), 4)
    assert compiled().take_not_finite(device) == "balance_mean_"
    assert (swaps == -1).tolist() == [i == 5 for i in range(8)]
    ops.obs_block_(weight, error, mask, factor)
    assert compiled().take_not_finite(device) == "obs_block_"
    assert_same_bits(weight[5].cpu(), before[5].cpu())
    weight.copy_(before)
    ops.quantize_block_(weight, error, mask, torch.ones(8, device="cuda"), factor, 4)
    assert compiled().take_not_finite(device) == "quantize_block_"
    assert_same_bits(weight[5].cpu(), before[5].cpu())
    factor[3, 3] = 0.0
    weight.copy_(before)
    ops.obs_block_(weight, error, mask, factor)
    assert compiled().take_not_finite(device) == "obs_block_"
    assert_same_bits(weight.cpu(), before.cpu())


# Statistics: the float64 oracle's bounds


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (129, 1134), (4097, 520)])
def test_moments_within_bounds(shape, state, weighted, dtype, random):
    x = (torch.randn(shape, generator=random) + 3).to(dtype)
    token_weight = torch.rand(shape[0], generator=random) if weighted else None
    made = [torch.zeros(size, dtype=state, device="cuda") for size in ((), shape[1:], shape[1:])]
    again = [t.clone() for t in made]
    for tensors in (made, again):
        ops.update_moments_(*tensors, x.cuda(), None if token_weight is None else token_weight.cuda())
    for one, other in zip(made, again, strict=True):
        assert_same_bits(one.cpu(), other.cpu())
    w = (torch.ones(shape[0]) if token_weight is None else token_weight).double()
    mean = (w[:, None] * x.double()).sum(0) / w.sum()
    expected = (w.sum(), mean, (w[:, None] * (x.double() - mean) ** 2).sum(0))
    bounds = moment_bounds(x, token_weight, torch.float32)  # partial states are float32 whatever the state
    for actual, exact, bound in zip(made, expected, bounds, strict=True):
        assert ((actual.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (257, 1134)])
def test_inverse_square_norm_within_bounds(shape, dtype, random):
    a = torch.randn(shape, generator=random).to(dtype)
    a[0] = 0
    r = ops.inverse_square_norm(a.cuda()).cpu().double()
    assert r[0] == 0
    exact = 1 / (a[1:].double() ** 2).sum(1)
    assert ((r[1:] - exact).abs() <= inverse_square_norm_bound(shape[1]) * exact).all()


@pytest.mark.parametrize(("tokens", "d_in", "d_out"), [(1, 1, 1), (33, 40, 24), (5000, 129, 65)])
def test_cosine_moment_within_bounds(tokens, d_in, d_out, dtype, random):
    """Both squares are rounded to bfloat16, 2^-8 each; all terms are positive; the rest is float32."""
    x, a = (torch.randn(tokens, d, generator=random).to(dtype) for d in (d_in, d_out))
    moment = torch.full((d_out, d_in), 0.5, device="cuda")
    ops.update_cosine_moment_(moment, x.cuda(), a.cuda())
    r = 1 / (a.double() ** 2).sum(1, keepdim=True)
    added = ((r * a.double()) ** 2).T @ x.double() ** 2
    bound = (2.0**-7 + 2.0**-15) * added + 2.0**-24 * (tokens + 8) * (added + 0.5)
    assert ((moment.cpu().double() - 0.5 - added).abs() <= bound).all()


@pytest.fixture(params=[True, False], ids=["reduced", "full"])
def reductions(request):
    """Reductions in reduced precision allowed, as is the default, or not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = request.param
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.usefixtures("reductions")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (33, 40), (5000, 129), (9000, 520)])
def test_gram_matrices_are_summed_in_float32(tokens, columns, scaled, dtype, random):
    """Products are exact; sums are float32, where tensor cores may cut off."""
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    scale = torch.exp2(torch.randint(-9, 9, (tokens,), generator=random).float()) if scaled else None
    state = GramState(columns, "cuda")
    state.update(x.cuda(), None if scale is None else scale.cuda())
    wide = x.double() * (1.0 if scale is None else scale.double()[:, None])
    bound = 2.0**-23 * (tokens + 8) * (wide.abs().T @ wide.abs())
    assert ((state.matrix.cpu().double() - wide.T @ wide).abs() <= bound).all()


# How the device is used


def test_side_stream_and_device_guard(random):
    weight, arguments = matrices(64, 512, torch.bfloat16, random, "scaled", ties=False)
    expected = weight.clone()
    ops.prune_topk_(expected, "scaled", 256, **arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = weight.cuda()
        ops.prune_topk_(actual, "scaled", 256, **on_gpu(arguments))
    stream.synchronize()
    assert_same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_graph_capture(group, random):
    weight, arguments = matrices(64, 512, torch.float16, random, "ria", ties=False)
    keep_k = 100 if group == "row" else 5000
    expected = weight.clone()
    ops.prune_topk_(expected, "ria", keep_k, group=group, **arguments)
    source, arguments = weight.cuda(), on_gpu(arguments)
    actual = torch.empty_like(source)

    def work():
        actual.copy_(source)
        ops.prune_topk_(actual, "ria", keep_k, group=group, **arguments)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(2):
        actual.zero_()
        graph.replay()
        assert_same_bits(actual.cpu(), expected)


FIRST_CALL = """
import torch
from ace_ext import ops
weight = torch.randn(2, 24576, dtype=torch.bfloat16)  # more shared memory than a kernel has without asking
column = torch.rand(24576) + 0.1
x, state = torch.randn(40, 64).cuda(), [torch.zeros(size, device="cuda") for size in ((), (64,), (64,))]
rows, matrix, groups, on_device = weight.cuda(), weight.cuda(), weight.cuda(), column.cuda()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ops.prune_topk_(rows, "scaled", 12288, column=on_device)
    ops.prune_topk_(matrix, "scaled", 24576, column=on_device, group="matrix")
    ops.prune_nm_(groups, "scaled", 2, 4, column=on_device)
    ops.update_moments_(*state, x)
graph.replay()
expected = [weight.clone() for _ in range(3)]
ops.prune_topk_(expected[0], "scaled", 12288, column=column)
ops.prune_topk_(expected[1], "scaled", 24576, column=column, group="matrix")
ops.prune_nm_(expected[2], "scaled", 2, 4, column=column)
for got, want in zip((rows, matrix, groups), expected, strict=True):
    assert torch.equal(got.cpu(), want)
assert state[0].item() == 40
"""


def test_the_first_calls_of_a_process_may_be_captured():
    """Each kernel's first launch sets its attributes and loads its module: neither may need a stream."""
    subprocess.run([sys.executable, "-c", FIRST_CALL], check=True)


def test_statistics_under_capture(random):
    x = torch.randn(300, 64, generator=random).cuda()
    state = [torch.zeros(size, dtype=torch.float64, device="cuda") for size in ((), (64,), (64,))]
    moment = torch.zeros(64, 64, device="cuda")

    def work():
        ops.update_moments_(*state, x, ops.inverse_square_norm(x))
        ops.update_cosine_moment_(moment, x, x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    once = [t.clone() for t in (*state[:1], moment)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    for before, after in zip(once, (*state[:1], moment), strict=True):
        torch.testing.assert_close(after, 2 * before)


def test_compile(random):
    weight, arguments = matrices(32, 256, torch.bfloat16, random, "scaled", ties=False)
    expected = weight.clone()
    ops.prune_topk_(expected, "scaled", 128, **arguments)
    column = arguments["column"].cuda()

    @torch.compile(fullgraph=True)
    def step(w):
        torch.ops.ace_ext.prune_topk_(w, "scaled", 128, column)
        return w

    assert_same_bits(step(weight.cuda()).cpu(), expected)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_two_runs_have_the_same_bits(group, random):
    weight = make_weight(512, 4096, torch.bfloat16, random).cuda()  # bfloat16 magnitudes: ties everywhere
    first, second = weight.clone(), weight.clone()
    keep_k = (4096 if group == "row" else weight.numel()) // 2
    for w in (first, second):
        ops.prune_topk_(w, "magnitude", keep_k, group=group)
    assert_same_bits(first.cpu(), second.cpu())


@pytest.mark.parametrize("what", ["row", "matrix", "nm"])
def test_extra_memory_is_below_one_per_cent(what):
    weight = torch.randn(4096, 11008, device="cuda", dtype=torch.bfloat16)
    column = torch.rand(11008, device="cuda") + 0.1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if what == "nm":
        ops.prune_nm_(weight, "ria", 2, 4, column=column)
    else:
        keep_k = (11008 if what == "row" else weight.numel()) // 2
        ops.prune_topk_(weight, "ria", keep_k, column=column, group=what)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.01 * weight.numel() * weight.element_size()


# What is not finite: deferred


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_flagged_and_left_alone(bad, dtype, random):
    device = torch.cuda.current_device()
    weight = make_weight(8, 64, dtype, random)
    weight[5, 7] = bad
    rows, matrix, groups = weight.cuda(), weight.cuda(), weight.cuda()
    threshold = ops.prune_topk_(rows, "magnitude", 20)
    assert compiled().take_not_finite(device) == "prune_topk_"
    assert threshold[5].isnan()
    assert_same_bits(rows[5].cpu(), weight[5])
    assert ((rows != 0).sum(1).cpu() == torch.tensor([20] * 5 + [64] + [20] * 2)).all()
    assert ops.prune_topk_(matrix, "magnitude", 200, group="matrix").isnan().all()
    assert compiled().take_not_finite(device) == "prune_topk_"
    assert_same_bits(matrix.cpu(), weight)
    ops.prune_nm_(groups, "magnitude", 2, 4)
    assert compiled().take_not_finite(device) == "prune_nm_"
    assert_same_bits(groups[5, 4:8].cpu(), weight[5, 4:8])
    assert ops.topk_mask(weight.cuda(), "magnitude", 20).sum(1).tolist() == [20] * 5 + [64] + [20] * 2
    assert ops.topk_mask(weight.cuda(), "magnitude", 200, group="matrix").all()
    assert compiled().take_not_finite(device) == "topk_mask"
    assert ops.nm_mask(weight.cuda(), "magnitude", 2, 4)[5, 4:8].all()
    assert compiled().take_not_finite(device) == "nm_mask"
    assert compiled().take_not_finite(device) == ""


def test_bad_token_weights_are_flagged():
    device = torch.cuda.current_device()
    state = [torch.zeros(size, device="cuda") for size in ((), (4,), (4,))]
    ops.update_moments_(*state, torch.ones(3, 4, device="cuda"), torch.tensor([1.0, -1.0, 1.0], device="cuda"))
    assert compiled().take_not_finite(device) == "update_moments_"


def test_mixed_devices_are_refused(random):
    weight, arguments = matrices(4, 8, torch.float32, random, "scaled", ties=False)
    with pytest.raises(ValueError, match="prune_topk_: column must be on cuda"):
        ops.prune_topk_(weight.cuda(), "scaled", 4, **arguments)
