"""Statistics against the reference, within the bounds of helpers.py. Contracts: csrc/ops.h."""

import pytest
import torch
from helpers import (
    UNIT,
    assert_only_slice_changed,
    assert_same_bits,
    cosine_moment_bound,
    embed,
    inverse_square_norm_bound,
    moment_bounds,
)

from ace_ext import ops
from ace_ext.ops import reference

TOKENS = (1, 2, 31, 32, 33, 63, 64, 65, 129, 1134)


def new_state(width, state, device="cpu"):
    return [torch.zeros(shape, dtype=state, device=device) for shape in ((), (width,), (width,))]


def assert_state(actual, x, token_weight=None):
    """Within the bounds of helpers.py from the reference's state of the same tokens."""
    expected = reference.moments(x, token_weight)
    bounds = moment_bounds(x, token_weight, actual[1].dtype)
    for name, got, exact, bound in zip(("weight_sum", "mean", "m2"), actual, expected, bounds, strict=True):
        excess = (got.cpu().double() - exact).abs() - bound
        assert (excess <= 0).all(), f"{name} is off by {excess.max()} more than its bound"


@pytest.fixture(params=[torch.float32, torch.float64], ids=["state32", "state64"])
def state(request):
    return request.param


# update_moments_


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_match_the_oracle(dtype, state, weighted, device, random):
    for tokens in TOKENS:
        for width in (1, 33, 129):
            x = (torch.randn(tokens, width, generator=random) + 0.5).to(dtype).to(device)
            token_weight = torch.rand(tokens, generator=random).to(device) if weighted else None
            actual = new_state(width, state, device)
            ops.update_moments_(*actual, x, token_weight)
            assert_state(actual, x, token_weight)


def test_moments_of_wide_inputs(device, random):
    # Wider than any strip of a kernel.
    x = torch.randn(70, 1134, generator=random).to(device)
    actual = new_state(1134, torch.float32, device)
    ops.update_moments_(*actual, x)
    assert_state(actual, x)


@pytest.mark.parametrize(
    "pieces", [[200], [1, 199], [199, 1], [64, 64, 72], [7] * 28 + [4], [0, 100, 0, 100], [1] * 200]
)
def test_moments_may_be_split_anywhere(pieces, state, device, random):
    x = (torch.randn(200, 5, generator=random) + 3).to(device)
    weight = torch.rand(200, generator=random).to(device)
    actual = new_state(5, state, device)
    for part, part_weight in zip(x.split(pieces), weight.split(pieces), strict=True):
        ops.update_moments_(*actual, part, part_weight)
    expected = reference.moments(x, weight)
    # Each call is one more merge, and with a float32 state as many more roundings.
    bounds = moment_bounds(x, weight, state)
    widen = (1 + len(pieces) / 64) if state == torch.float32 else 1
    for got, exact, bound in zip(actual, expected, bounds, strict=True):
        assert ((got.cpu().double() - exact).abs() <= bound * widen).all()


def test_moments_match_merged_states(state, random):
    x, y = torch.randn(40, 3, generator=random), torch.randn(90, 3, generator=random) + 5
    actual = new_state(3, state)
    ops.update_moments_(*actual, x)
    ops.update_moments_(*actual, y)
    merged = reference.merge(reference.moments(x), reference.moments(y))
    for got, exact, bound in zip(actual, merged, moment_bounds(torch.cat([x, y]), None, state), strict=True):
        assert ((got.double() - exact).abs() <= bound).all()


def test_zero_token_weights_leave_tokens_out(state, device, random):
    x = torch.randn(300, 6, generator=random)
    weight = torch.rand(300, generator=random)
    weight[:130] = 0  # whole blocks of them
    weight[200:300:3] = 0
    x[weight == 0] *= 1e4
    actual = new_state(6, state, device)
    ops.update_moments_(*actual, x.to(device), weight.to(device))
    assert_state(actual, x[weight > 0], weight[weight > 0])


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_weight_changes_nothing(tokens, state, device):
    actual = [torch.tensor(v, dtype=state, device=device) for v in (3.0, [0.1, -0.2], [0.7, 0.0])]
    before = [t.clone() for t in actual]
    x = torch.full((tokens, 2), 9.0, device=device)
    ops.update_moments_(*actual, x, torch.zeros(tokens, device=device))
    if tokens == 0:
        ops.update_moments_(*actual, x)
    for got, expected in zip(actual, before, strict=True):
        assert_same_bits(got, expected)


def test_moments_of_no_columns_count_the_weight(state, device):
    actual = new_state(0, state, device)
    ops.update_moments_(*actual, torch.ones(5, 0, device=device))
    ops.update_moments_(*actual, torch.ones(2, 0, device=device), torch.tensor([0.5, 0.0], device=device))
    assert actual[0].item() == 5.5
    assert actual[1].shape == actual[2].shape == (0,)


def test_moments_survive_a_mean_far_above_the_spread(state, device, random):
    """Where E[x^2] - E[x]^2 in float32 has no correct digit."""
    x = torch.randn(1134, 16, generator=random) + 4096
    actual = new_state(16, state, device)
    ops.update_moments_(*actual, x.to(device))
    assert_state(actual, x)
    naive = (x.square().mean(0) - x.mean(0).square()) * len(x)
    excess = (naive.double() - reference.moments(x).m2).abs() - moment_bounds(x, None, state)[2]
    assert (excess > 0).sum() > 10  # of 16: a few land near by chance
    assert (naive < 0).any()


def test_moments_survive_a_massive_first_token(dtype, state, device, random):
    x = (torch.randn(512, 8, generator=random) / 2).to(dtype)
    x[0] = 3000
    weight = torch.ones(512)
    weight[0] = 1e-6  # as 1 / ||a||^2 weighs such a token
    for token_weight in (None, weight):
        actual = new_state(8, state, device)
        ops.update_moments_(*actual, x.to(device), None if token_weight is None else token_weight.to(device))
        assert_state(actual, x, token_weight)


def test_equal_tokens_have_no_variance(dtype, state, device):
    x = torch.full((200, 3), 0.3, dtype=dtype, device=device)
    actual = new_state(3, state, device)
    ops.update_moments_(*actual, x)
    assert_state(actual, x)
    assert (actual[2] >= 0).all()


def test_moments_read_a_column_slice(dtype, state, device, random):
    x = torch.randn(70, 33, generator=random).to(dtype).to(device)
    outer, view = embed(x)
    strided, dense = new_state(33, state, device), new_state(33, state, device)
    ops.update_moments_(*strided, view)
    ops.update_moments_(*dense, x)
    for a, b in zip(strided, dense, strict=True):
        assert_same_bits(a, b)
    assert_only_slice_changed(outer, view)


# inverse_square_norm and update_cosine_moment_


def test_inverse_square_norm_matches_the_oracle(dtype, device, random):
    for tokens in (1, 2, 33, 129):
        for width in (1, 2, 31, 32, 33, 129, 1134):
            a = (torch.randn(tokens, width, generator=random) + 0.1).to(dtype).to(device)
            r = ops.inverse_square_norm(a)
            assert r.dtype == torch.float32
            torch.testing.assert_close(
                r.cpu().double(), reference.inverse_square_norm(a), rtol=inverse_square_norm_bound(width), atol=0
            )
            assert_same_bits(ops.inverse_square_norm(embed(a)[1]), r)


def test_inverse_square_norm_of_a_zero_row_is_zero(dtype, device):
    a = torch.tensor([[0.0, -0.0], [0.5, 0.0]], dtype=dtype, device=device)
    assert ops.inverse_square_norm(a).tolist() == [0.0, 4.0]
    assert ops.inverse_square_norm(a[:0]).shape == (0,)
    assert ops.inverse_square_norm(a[:, :0]).tolist() == [0.0, 0.0]


def test_inverse_square_norm_of_large_halves(device):
    # The sum of squares is beyond float16, not beyond float32.
    a = torch.full((1, 100), 60000.0, dtype=torch.float16, device=device)
    torch.testing.assert_close(ops.inverse_square_norm(a).item(), 1 / (100 * 60000.0**2), rtol=102 * UNIT, atol=0)


def assert_cosine_moment(actual, x, a, start=0.0):
    expected = reference.cosine_moment(x, a) + start
    rtol = cosine_moment_bound(x.shape[0], a.shape[1])
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=0)


def test_cosine_moment_matches_the_oracle(dtype, device, random):
    for tokens, d_in, d_out in ((1, 1, 1), (2, 33, 31), (33, 1, 129), (129, 129, 2), (65, 1134, 3)):
        x = torch.randn(tokens, d_in, generator=random).to(dtype).to(device)
        a = torch.randn(tokens, d_out, generator=random).to(dtype).to(device)
        a[tokens // 2] = 0  # r is 0 there, and so is what it adds
        start = 0.0 if tokens % 2 else 1.0
        moment = torch.full((d_out, d_in), start, device=device)
        ops.update_cosine_moment_(moment, x, a)
        assert_cosine_moment(moment, x, a, start)


def test_cosine_moment_adds_up_over_calls(device, random):
    x, a = torch.randn(100, 7, generator=random).to(device), torch.randn(100, 5, generator=random).to(device)
    moment = torch.zeros(5, 7, device=device)
    for part in (slice(0, 1), slice(1, 1), slice(1, 40), slice(40, 100)):
        ops.update_cosine_moment_(moment, x[part], a[part])
    assert_cosine_moment(moment, x, a)


def test_cosine_moment_of_many_tokens(device, random):
    # More tokens than an op squares at a time.
    x, a = torch.randn(4500, 3, generator=random).to(device), torch.randn(4500, 2, generator=random).to(device)
    moment = torch.zeros(2, 3, device=device)
    ops.update_cosine_moment_(moment, x, a)
    assert_cosine_moment(moment, x, a)


def test_cosine_moment_of_a_massive_token(dtype, device, random):
    x, a = torch.randn(65, 9, generator=random) / 2, torch.randn(65, 4, generator=random)
    x[0], a[0] = 3000, torch.tensor([2000.0, -1.0, 0.5, 8.0])
    x, a = x.to(dtype).to(device), a.to(dtype).to(device)
    moment = torch.zeros(4, 9, device=device)
    ops.update_cosine_moment_(moment, x, a)
    assert_cosine_moment(moment, x, a)


def test_cosine_moment_is_as_precise_as_torchs_matmuls_are_told_to_be(device, random):
    """If the caller allows bfloat16 products, each square is rounded to 8 bits: twice 2^-9, without cancellation."""
    x, a = torch.randn(65, 129, generator=random).to(device), torch.randn(65, 33, generator=random).to(device)
    moment = torch.zeros(33, 129, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ops.update_cosine_moment_(moment, x, a)
    finally:
        torch.set_float32_matmul_precision(before)
    rtol = 2**-8 * (1 + 2**-7) + cosine_moment_bound(65, 33)
    torch.testing.assert_close(moment.cpu().double(), reference.cosine_moment(x, a).cpu(), rtol=rtol, atol=0)


def test_cosine_moment_reads_column_slices(dtype, device, random):
    x = torch.randn(33, 31, generator=random).to(dtype).to(device)
    a = torch.randn(33, 5, generator=random).to(dtype).to(device)
    moment = torch.zeros(5, 31, device=device)
    ops.update_cosine_moment_(moment, embed(x)[1], embed(a)[1])
    assert_cosine_moment(moment, x, a)


@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_cosine_moment_of_nothing(shape, device):
    tokens, d_in, d_out = shape
    moment = torch.full((d_out, d_in), 0.1, device=device)
    x, a = torch.ones(tokens, d_in, device=device), torch.ones(tokens, d_out, device=device)
    ops.update_cosine_moment_(moment, x, a)
    # Without inputs or outputs there is no entry; without tokens none may change.
    assert_same_bits(moment, torch.full((d_out, d_in), 0.1))


def test_padding_between_tokens(dtype, state, device, random):
    # Tokens of weight 0 may hold anything, wherever they are among those that an op adds at once.
    x = torch.randn(200, 33, generator=random).to(dtype)
    token_weight = torch.rand(200, generator=random) * (torch.rand(200, generator=random) < 0.7)
    clean = torch.where((token_weight == 0)[:, None], torch.zeros_like(x), x)
    x[token_weight == 0] = float("nan")
    actual = new_state(33, state, device)
    ops.update_moments_(*actual, x.to(device), token_weight.to(device))
    assert_state(actual, clean, token_weight)


def test_moments_do_not_read_tokens_of_weight_zero():
    x = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 5.0]])
    state = [torch.zeros(()), torch.zeros(2), torch.zeros(2)]
    ops.update_moments_(*state, x, torch.tensor([1.0, 0.0, 1.0]))
    assert [value.tolist() for value in state] == [2.0, [2.0, 3.5], [2.0, 4.5]]
