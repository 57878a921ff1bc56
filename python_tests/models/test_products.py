"""Products in float32 on CPUs without instructions for half precision, forced here on any CPU."""

import copy

import pytest
import torch
from tiny_models import make_model
from torch.nn import functional

from ace_ext import PruneConfig, prune_model
from ace_ext.models import attention, products
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
def test_product_of_two_matrices(dtype):
    a, b = normal(130, 150, dtype=dtype), normal(150, 24, dtype=dtype, seed=1)
    assert_close(products.matmul(a, b), a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_of_two_matrices_that_is_left_to_torch(dtype):
    a, b = normal(130, 150, dtype=dtype), normal(150, 24, dtype=dtype, seed=1)
    assert torch.equal(products.matmul(a, b), a @ b)


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


def attention_inputs(dtype, heads=2):
    """Query, key and value ``[2, heads, 20, 16]``, the latter two with 2 heads."""
    shapes = [(2, heads, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16)]
    return [normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


MASK = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(5)) < 0.6
MASK[..., 0] = True  # each query sees something
OPTIONS = [
    {},
    {"is_causal": True},
    {"attn_mask": MASK},
    {"attn_mask": torch.where(MASK, 0.0, -3.0), "scale": 0.3},
    {"is_causal": True, "enable_gqa": True},
]


def options_in(dtype, options):
    """The same options, with a mask that is added in ``dtype``."""
    mask = options.get("attn_mask")
    return options if mask is None or mask.dtype == torch.bool else options | {"attn_mask": mask.to(dtype)}


def attend(given, options):
    with float32_products(given[0]):
        return functional.scaled_dot_product_attention(*given, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "mask", "bias", "groups"])
def test_gradients_of_attention(dtype, options):
    """The result has the bits of torch's own. Gradients are those in float64, with errors of float32 sums (up to 1e-5)
    and one rounding to the gradient's dtype."""
    options = options_in(dtype, options)
    given = attention_inputs(dtype, heads=4 if "enable_gqa" in options else 2)
    below = normal(*given[0].shape, dtype=dtype, seed=7)
    leaves = [part.clone().requires_grad_() for part in given]
    found = attend(leaves, options)
    assert torch.equal(found, functional.scaled_dot_product_attention(*given, **options))
    exact = [part.double().requires_grad_() for part in given]
    output = functional.scaled_dot_product_attention(*exact, **options_in(torch.double, options))
    expected = torch.autograd.grad(output, exact, below.double())
    for one, other in zip(torch.autograd.grad(found, leaves, below), expected, strict=True):
        assert one.dtype == dtype
        assert torch.allclose(one.double(), other, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)


@pytest.mark.parametrize("wanted", range(3))
def test_gradient_of_one_part_of_attention(wanted):
    given = attention_inputs(torch.bfloat16)
    below = normal(*given[0].shape, dtype=torch.bfloat16, seed=7)
    leaves = [part.clone().requires_grad_() for part in given]
    all_found = torch.autograd.grad(attend(leaves, {"is_causal": True}), leaves, below)
    given[wanted].requires_grad_()
    (found,) = torch.autograd.grad(attend(given, {"is_causal": True}), given[wanted], below)
    assert torch.equal(found, all_found[wanted])


def test_attention_that_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(attention._Attention, "apply", None)
    given = attention_inputs(torch.bfloat16)
    attend(given, {})
    leaves = [part.clone().requires_grad_() for part in given]
    with torch.no_grad():
        attend(leaves, {})
    attend(leaves, {"dropout_p": 0.1})
    attend(leaves, {"attn_mask": torch.zeros(20, 20, dtype=torch.bfloat16, requires_grad=True)})
    functional.scaled_dot_product_attention(*leaves)
    wide = [part.float().requires_grad_() for part in given]
    with float32_products(given[0]):
        functional.scaled_dot_product_attention(*wide)
    with pytest.raises(TypeError):
        attend(leaves, {})
    monkeypatch.setattr(products, "slow_dtypes", frozenset)
    attend(leaves, {})
