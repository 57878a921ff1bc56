"""Mixtures: experts that are multiplied from their own packed weights."""

import pytest
import torch
from serving.test_matrices import make
from torch.nn import functional

from ace_ext.packed.matrix import PackedMatrix
from ace_ext.serving.experts import ExpertOptions, Mixture

HIDDEN, INNER, EXPERTS = 64, 40, 4


def silu_and_up(x):
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def weights(dtype=torch.float32):
    up = [make("ragged", dtype, seed, (2 * INNER, HIDDEN)) for seed in range(EXPERTS)]
    return up, [make("even", dtype, seed + 9, (HIDDEN, INNER)) for seed in range(EXPERTS)]


def packed(matrices):
    """The first expert is dense."""
    return [matrices[0], *(PackedMatrix.of(one) for one in matrices[1:])]


def routing(tokens, random):
    chosen = torch.rand(tokens, EXPERTS, generator=random).topk(2).indices
    return torch.rand(tokens, 2, generator=random), chosen.to(torch.int32)


def expected(x, up, down, share, chosen, up_bias=None, down_bias=None, weigh_input=False):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(share[token], chosen[token].tolist(), strict=True):
            given = x[token] * weight if weigh_input else x[token]
            inner = silu_and_up(functional.linear(given, up[expert], None if up_bias is None else up_bias[expert]))
            found = functional.linear(inner, down[expert], None if down_bias is None else down_bias[expert])
            out[token] += found if weigh_input else weight * found
    return out


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weigh_input", [True, False])
def test_the_weighted_sum_of_the_chosen_experts(tokens, bias, weigh_input, random):
    up, down = weights()
    x, (share, chosen) = torch.randn(tokens, HIDDEN, generator=random), routing(tokens, random)
    up_bias = torch.randn(EXPERTS, 2 * INNER, generator=random) if bias else None
    down_bias = torch.randn(EXPERTS, HIDDEN, generator=random) if bias else None
    mixture = Mixture(packed(up), packed(down), ExpertOptions(silu_and_up, weigh_input, up_bias, down_bias))
    wanted = expected(x, up, down, share, chosen, up_bias, down_bias, weigh_input)
    torch.testing.assert_close(mixture(x, share, chosen), wanted, rtol=1e-4, atol=1e-4)


def test_the_experts_of_two_ranks_add_up(random):
    up, down = weights()
    x, (share, chosen) = torch.randn(9, HIDDEN, generator=random), routing(9, random)
    total = torch.zeros_like(x)
    for here, places in (([1, 3], [-1, 0, -1, 1]), ([0, 2], [0, -1, 1, -1])):
        options = ExpertOptions(silu_and_up, places=torch.tensor(places, dtype=torch.int32))
        rank = Mixture([packed(up)[at] for at in here], [packed(down)[at] for at in here], options)
        total += rank(x, share, chosen)
    torch.testing.assert_close(total, expected(x, up, down, share, chosen), rtol=1e-4, atol=1e-4)


def test_bfloat16_sums_over_experts_in_float32(random):
    up, down = weights(torch.bfloat16)
    x, (share, chosen) = torch.randn(5, HIDDEN, generator=random).bfloat16(), routing(5, random)
    found = Mixture(packed(up), packed(down), ExpertOptions(silu_and_up))(x, share, chosen)
    assert found.dtype == torch.bfloat16
    wanted = expected(x.float(), [one.float() for one in up], [one.float() for one in down], share, chosen)
    torch.testing.assert_close(found.float(), wanted, rtol=3e-2, atol=3e-1)


def test_a_compiled_model_calls_it_as_one_op(random):
    up, down = weights()
    mixture = Mixture(packed(up), packed(down), ExpertOptions(silu_and_up))
    compiled = torch.compile(lambda *given: mixture(*given) + 1, fullgraph=True, backend="aot_eager")
    for tokens in (4, 9):
        x, (share, chosen) = torch.randn(tokens, HIDDEN, generator=random), routing(tokens, random)
        torch.testing.assert_close(compiled(x, share, chosen), mixture(x, share, chosen) + 1)


def test_mixtures_are_forgotten_with_their_layer():
    from ace_ext.serving.experts import _mixtures

    mixture = Mixture(*weights(), ExpertOptions(silu_and_up))
    number = mixture.number
    assert _mixtures[number] is mixture
    del mixture
    assert number not in _mixtures
