"""The Gram matrix against float64, and its factorisations against explicit inverses."""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ace_ext import InputError
from ace_ext.pruning import gram
from ace_ext.pruning.damping import floor_energy, penalty
from ace_ext.pruning.gram import MAX_ATTEMPTS, GramState, RelativeLoss


def make_state(tokens=40, columns=9, seed=0) -> tuple[GramState, torch.Tensor]:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    state = GramState(columns)
    state.update(x)
    return state, x


@pytest.mark.parametrize("scaled", [False, True])
def test_matrix_is_the_sum_of_scaled_tokens(monkeypatch, dtype, scaled, random):
    monkeypatch.setattr(gram, "CHUNK_TOKENS", 7)  # 20 tokens: two whole chunks and a rest
    x = torch.randn(20, 5, generator=random).to(dtype)
    scale = torch.exp2(torch.randint(-9, 9, (20,), generator=random).float()) if scaled else None
    state = GramState(5)
    state.update(x[:1], None if scale is None else scale[:1])
    state.update(x[1:], None if scale is None else scale[1:])
    wide = x.double() * (1.0 if scale is None else scale.double()[:, None])
    torch.testing.assert_close(state.matrix.double(), wide.T @ wide, rtol=1e-5, atol=1e-5)
    assert state.tokens == 20


META_KNOWS_DTYPES = Version(torch.__version__) >= Version("2.13")
"""With torch 2.11 ``addmm`` with an ``out_dtype`` fails on the meta device: it reads the dtype as the factor beta."""


class Products(TorchDispatchMode):
    """Records the dtypes of the factors of each product that is added to a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.addmm or func.overloadpacket is torch.ops.aten.addmm_:
            self.found.append((args[1].dtype, args[2].dtype))
            if func is torch.ops.aten.addmm.dtype_out and not META_KNOWS_DTYPES:
                return kwargs["out"]  # without a value, as all on that device
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_exact_factors_are_multiplied_as_they_are(monkeypatch, exact, dtype, scaled):
    """On the meta device, with the calls for a GPU. The sum stays float32, in place."""
    monkeypatch.setattr(gram, "CHUNK_TOKENS", 7)
    monkeypatch.setattr(gram, "multiplies_exactly", lambda _: exact)
    state, x = GramState(5, "meta"), torch.empty(20, 5, dtype=dtype, device="meta")
    matrix = state.matrix
    with Products() as products:
        state.update(x, torch.empty(20, device="meta") if scaled else None)
    stays = exact and (dtype == torch.bfloat16 or not scaled)  # float16 has too few exponents
    assert products.found == [(dtype, dtype) if stays else (torch.float32, torch.float32)] * 3
    assert state.matrix is matrix
    assert matrix.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensor_cores_get_what_they_multiply_exactly(monkeypatch, device, dtype):
    with FakeTensorMode():
        x = torch.empty(2, 5, dtype=dtype, device=device)
    assert gram.multiplies_exactly(x) == (dtype == torch.bfloat16 or (device == "cuda" and dtype == torch.float16))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert gram.multiplies_exactly(x) == (dtype == torch.bfloat16)


def test_merged_ranks_are_one_state():
    whole, x = make_state()
    first, second = GramState(9), GramState(9)
    first.update(x[:13])
    second.update(x[13:])
    first.merge_(second)
    torch.testing.assert_close(first.matrix, whole.matrix)
    assert first.tokens == whole.tokens


def test_relative_loss_is_that_of_the_outputs(random):
    state, x = make_state()
    dense, pruned = torch.randn(4, 9, generator=random), torch.randn(4, 9, generator=random)
    expected = float((x @ (pruned - dense).T).square().sum() / (x @ dense.T).square().sum())
    assert RelativeLoss(state.energy, dense)(pruned) == pytest.approx(expected, rel=1e-5)


def test_relative_loss_of_no_output_is_nothing():
    state, _ = make_state()
    assert RelativeLoss(state.energy, torch.zeros(2, 9))(torch.zeros(2, 9)) == 0.0


def test_obs_factor_is_that_of_the_inverse():
    state, x = make_state()
    factor = state.obs_factor(0.01)
    gram = x.double().T @ x.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(9)
    expected = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    torch.testing.assert_close(factor.upper.double(), expected, rtol=1e-4, atol=1e-6)
    assert (factor.damping, factor.attempts) == (0.01, 1)


def test_floor_energy_is_of_the_columns_that_are_seen():
    assert float(floor_energy(torch.tensor([1.0, 0.0, 100.0, 10.0]), 0.3)) == pytest.approx(3.0)
    assert float(floor_energy(torch.zeros(3), 0.3)) == 0.0


@pytest.mark.parametrize("floor", [0.0, 0.2])
@pytest.mark.parametrize("relaxation", [1.0, 1.6])
@pytest.mark.parametrize("damping", [0.1, 0.0])
def test_admm_factor_is_of_normalised_columns(floor, relaxation, damping):
    state, x = make_state()
    factor = state.admm_factor(damping, floor, relaxation)
    gram = x.double().T @ x.double()
    gram += floor * gram.diagonal().log().mean().exp() * torch.eye(9)
    norm, rho = gram.diagonal().sqrt(), penalty(damping)
    inverse = torch.linalg.inv(gram / norm / norm[:, None] + (damping + rho) * torch.eye(9))
    torch.testing.assert_close(factor.norm.double(), norm, rtol=len(x) * 2.0**-24, atol=0.0)  # a float32 sum
    step = relaxation * rho * inverse + (1 - relaxation) * torch.eye(9)
    torch.testing.assert_close(factor.step.double(), step, rtol=1e-5, atol=1e-6)
    powers = [torch.linalg.matrix_power(inverse, power).diagonal() for power in range(1, 5)]
    terms = [rho**k * power for k, power in enumerate(powers)]
    series = sum(terms[:3]) + terms[3] / (1 - terms[3] / terms[2])
    torch.testing.assert_close(factor.inverse_diagonal.double(), series, rtol=1e-5, atol=0.0)
    exact = torch.linalg.inv(gram / norm / norm[:, None] + max(damping, 1e-3) * torch.eye(9)).diagonal()
    assert (factor.inverse_diagonal <= exact * 1.001).all()  # the ratio of its terms rises to that of the largest


@pytest.mark.parametrize(("products", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("relaxation", [1.0, 1.6])
def test_a_step_of_admm_solves_for_the_weight_and_relaxes_it(products, tolerance, relaxation, random):
    state, x = make_state()
    factor = state.admm_factor(0.1, 0.0, relaxation, products)
    assert factor.dtype == products
    dense, kept, dual = (torch.randn(4, 9, generator=random) for _ in range(3))
    norm, rho = factor.norm.double(), penalty(0.1)
    hessian = (x.double().T @ x.double()) / norm / norm[:, None] + 0.1 * torch.eye(9)
    start = dense * norm
    weight = (start @ hessian + rho * (kept - dual)) @ torch.linalg.inv(hessian + rho * torch.eye(9))
    expected = relaxation * weight + (1 - relaxation) * (kept - dual)
    found = start + factor.times((kept - dual - start).to(products))
    assert (found - expected).norm() < tolerance * expected.norm()


def test_factors_are_shared_until_more_tokens_come():
    state, x = make_state()
    first = state.obs_factor(0.01), state.admm_factor(0.1)
    assert (state.obs_factor(0.01), state.admm_factor(0.1)) == first
    assert state.obs_factor(0.02) is not first[0]
    assert state.admm_factor(0.1, 0.2) is not first[1]
    state.update(x)
    assert state.obs_factor(0.01) is not first[0]
    assert state.admm_factor(0.1) is not first[1]


def test_a_factor_without_the_diagonal_is_otherwise_the_same():
    state, _ = make_state()
    without = state.admm_factor(0.1, diagonal=False)
    assert without.inverse_diagonal is None
    assert torch.equal(without.step, state.admm_factor(0.1).step)


def test_fewer_tokens_than_columns_are_damped_until_it_works():
    state, _ = make_state(tokens=3)
    factor = state.obs_factor(0.0)
    assert factor.attempts > 1
    assert factor.damping == pytest.approx(1e-6 * 10 ** (factor.attempts - 2))


def test_fewer_tokens_than_columns_need_no_damping_in_admm():
    state, _ = make_state(tokens=3)
    factor = state.admm_factor(0.0)  # its penalty is a damping
    assert (factor.attempts, factor.damping) == (1, 0.0)
    assert torch.isfinite(factor.step).all()


@pytest.mark.parametrize("kind", ["obs_factor", "admm_factor"])
def test_dead_columns_are_told(kind):
    state, x = make_state()
    x[:, 4] = 0
    state = GramState(9)
    state.update(x)
    factor = getattr(state, kind)(0.01)
    assert factor.dead.nonzero().flatten().tolist() == [4]
    assert factor.attempts == 1


@pytest.mark.parametrize("kind", ["obs_factor", "admm_factor"])
def test_what_no_damping_mends_is_an_error(kind):
    state, x = make_state()
    x[0, 0] = float("inf")
    state.update(x)
    with pytest.raises(InputError, match="Gram matrix of the inputs must become positive definite"):
        getattr(state, kind)(0.01)


def test_attempts_are_bounded():
    state, _ = make_state()
    state.matrix[:] = -1.0
    state.matrix.diagonal()[:] = 1e-30  # negative whatever the damping
    with pytest.raises(InputError, match=rf"up to {1e-2 * 10 ** (MAX_ATTEMPTS - 1):g} of its mean diagonal"):
        state.obs_factor(0.01)


@pytest.mark.parametrize("at_once", [1, 40, 2**16])
def test_masked_is_the_product_with_the_mask(at_once, monkeypatch):
    monkeypatch.setattr(gram, "MASKED_AT_ONCE", at_once)
    weight, mask = torch.randn(7, 33), torch.rand(7, 33) < 0.5
    expected = torch.where(mask, weight, 0.0)
    out = torch.full_like(weight, torch.nan)
    assert gram.masked(weight, mask, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(gram.masked(weight, mask, out=weight), expected)
