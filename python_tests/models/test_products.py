"""Products in float32 on CPUs without instructions for half precision, forced here on any CPU."""

import copy

import pytest
import torch
from tiny_models import make_model
from torch.nn import functional

from ace_ext import PruneConfig, prune_model
from ace_ext.models import products
from ace_ext.models.products import MIN_TOKENS, float32_products

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Every CPU is slow, and parts are so small that each product has several, the last of them ragged."""
    monkeypatch.setattr(products, "slow_dtypes", lambda: frozenset(HALF))
    monkeypatch.setattr(products, "TOKENS", 70)
    monkeypatch.setattr(products, "PANEL", 64 * 24)
    monkeypatch.setattr(products, "PART", 70 * 24)
    monkeypatch.setattr(products, "ROWS", 100)


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def widened(*arguments):
    with float32_products(arguments[0]):
        return functional.linear(*arguments)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(MIN_TOKENS, 24), (150, 24), (3, 50, 24), (2, 3, 4, 24), (70, 1)])
@pytest.mark.parametrize("rows", [1, 64, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_one_rounding_of_the_float32_product(dtype, shape, rows, bias):
    """Small whole numbers, whose sums are exact in any order."""
    x = normal(*shape, dtype=dtype).mul(4).round()
    weight = normal(rows, shape[-1], dtype=dtype, seed=1).mul(4).round()
    shift = normal(rows, dtype=dtype, seed=2) if bias else None
    expected = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    assert torch.equal(widened(x, weight, shift), expected.float().to(dtype))


def assert_close(found, a, b):
    """``found`` is ``a b`` with one rounding of a sum in float32, whose own rounding errors are those of its terms."""
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    bound = torch.finfo(found.dtype).eps / 2 * exact.abs() + (b.shape[0] + 8) * 2**-24 * terms
    assert ((found.double() - exact).abs() <= bound + torch.finfo(found.dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", HALF)
def test_close_to_torchs_own(dtype):
    x, weight = normal(150, 24, dtype=dtype), normal(130, 24, dtype=dtype, seed=1)
    assert_close(widened(x, weight), x, weight.T)
    exact = x.double() @ weight.double().T
    assert torch.allclose(functional.linear(x, weight).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(dtype, bias):
    given = [normal(3, 50, 24, dtype=dtype), normal(130, 24, dtype=dtype, seed=1)]
    given += [normal(130, dtype=dtype, seed=2)] if bias else []
    below = normal(3, 50, 130, dtype=dtype, seed=3)
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    found = torch.autograd.grad(widened(*leaves), leaves, below)
    assert [gradient.dtype for gradient in found] == [dtype] * len(given)
    assert [gradient.shape for gradient in found] == [tensor.shape for tensor in given]
    rows = below.flatten(0, 1)
    assert_close(found[0].flatten(0, 1), rows, given[1])
    assert_close(found[1], rows.T, given[0].flatten(0, 1))
    if bias:
        assert_close(found[2][None], torch.ones(1, len(rows), dtype=dtype), rows)
    x = given[0].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(widened(x, *given[1:]), x, below)[0], found[0])


def test_what_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(products._Linear, "apply", None)
    weight = normal(8, 24, dtype=torch.bfloat16)
    widened(normal(MIN_TOKENS - 1, 24, dtype=torch.bfloat16), weight)
    widened(normal(9, 24, dtype=torch.float32), weight.float())
    widened(weight.to("meta"), weight.to("meta"))
    with pytest.raises(RuntimeError, match="same dtype"):
        widened(normal(9, 24, dtype=torch.float32), weight)
    with pytest.raises(TypeError):
        widened(weight, weight)
    functional.linear(weight, weight)
    monkeypatch.setattr(products, "slow_dtypes", frozenset)
    widened(weight, weight)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_model_is_pruned_by_it(family, dtype, monkeypatch):
    """The errors of its matrices are those that torch's own products give, up to one rounding of the outputs before and
    after. Their masks do not depend on products, which could decide between two weights of nearly one score."""
    model = make_model(family, dtype)
    tokens = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    reports = []
    for slow in (frozenset(HALF), frozenset()):
        monkeypatch.setattr(products, "slow_dtypes", lambda slow=slow: slow)
        reports.append(prune_model(copy.deepcopy(model), tokens, PruneConfig("magnitude")))
    for one, other in zip(*(report.matrices for report in reports), strict=True):
        assert one.nonzero == other.nonzero
        assert abs(one.relative_error - other.relative_error) <= torch.finfo(dtype).eps  # twice half a unit
