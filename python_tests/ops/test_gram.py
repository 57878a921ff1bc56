"""update_gram_ against the reference, within the bound of helpers.py. Contract: csrc/ops/gram.h.

With ``ONEDNN_MAX_CPU_ISA=AVX2`` the same tests run the code for CPUs without AMX on one that has it.
"""

import pytest
import torch
from helpers import assert_same_bits, embed, gram_bound

from ace_ext import ops
from ace_ext.ops import reference

TOKENS = (1, 2, 255, 256, 257, 513)
WIDTHS = (1, 2, 63, 64, 65, 95, 96, 97, 129, 300, 1000)
"""At, below and above the blocks of both ways to multiply: 64 columns, and 96 or an eighth of all."""


def assert_gram(gram, x):
    assert ((gram.double() - reference.gram(x)).abs() <= gram_bound(x)).all()
    assert_same_bits(gram, gram.T.contiguous())


@pytest.mark.parametrize("width", WIDTHS)
def test_gram_matches_the_oracle(width, dtype, random):
    for tokens in TOKENS:
        x = (torch.randn(tokens, width, generator=random) + 0.5).to(dtype)
        gram = torch.zeros(width, width)
        ops.update_gram_(gram, x)
        assert_gram(gram, x)


def test_gram_may_be_split_anywhere(dtype, random):
    x = torch.randn(700, 70, generator=random).to(dtype)
    gram = torch.zeros(70, 70)
    for part in x.split([1, 299, 0, 333, 67]):
        ops.update_gram_(gram, part)
    assert_gram(gram, x)


def test_gram_is_mirrored_when_asked(dtype, random):
    x = torch.randn(900, 300, generator=random)
    gram = torch.zeros(300, 300)
    for part in (x[:300].to(dtype), x[300:600], x[600:].bfloat16()):  # in blocks of several widths
        ops.update_gram_(gram, part, mirror=False)
    lower = gram.tril()
    gram += torch.ones_like(gram).triu(1)  # the upper half is undefined
    ops.update_gram_(gram, x[:0])
    assert_same_bits(gram.tril(), lower)
    assert_gram(gram, torch.cat((x[:300].to(dtype).float(), x[300:600], x[600:].bfloat16().float())))


def test_gram_reads_a_column_slice(dtype, random):
    x = torch.randn(33, 31, generator=random).to(dtype)
    gram = torch.zeros(31, 31)
    ops.update_gram_(gram, embed(x)[1])
    assert_gram(gram, x)


def test_gram_of_a_massive_token(dtype, random):
    x = (torch.randn(300, 70, generator=random) / 2).to(dtype)
    x[0] = 3000
    gram = torch.zeros(70, 70)
    ops.update_gram_(gram, x)
    assert_gram(gram, x)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_gram_of_nothing(shape, dtype):
    gram = torch.full((shape[1], shape[1]), 0.1)
    ops.update_gram_(gram, torch.ones(shape, dtype=dtype))
    assert_same_bits(gram, torch.full((shape[1], shape[1]), 0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_holds_what_is_not_finite(value, dtype):
    x = torch.ones(5, 70, dtype=dtype)
    x[3, 66] = value
    gram = torch.zeros(70, 70)
    ops.update_gram_(gram, x)
    bad = ~torch.isfinite(gram)
    assert bad[66].all()
    assert bad[:, 66].all()
    assert bad.sum() == 139
