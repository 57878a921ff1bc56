"""Products with symmetric matrices, and their inverses."""

import pytest
import torch

from ace_ext.pruning.symmetric import LEAST_DIVIDED, energy, inverse_factor_, invert_damped_


def well_conditioned(columns, random):
    """A normalised Gram matrix of inputs with a common direction, and ADMM's penalty: as ADMM inverts it."""
    x = torch.randn(2 * columns, columns, generator=random) + 0.5
    x /= x.norm(dim=0)
    matrix = x.T @ x
    matrix.diagonal().add_(1.1)
    return matrix


@pytest.mark.parametrize("columns", [9, 96, 97, 1000])  # one block, one of full width, two, and eight that differ
def test_the_energy_takes_half_of_the_products(columns, random):
    x = torch.randn(40, columns, generator=random) + 0.5
    changes = torch.randn(200, columns, generator=random)
    expected = (changes.double() @ x.double().T).square().sum()
    assert float(energy(x.T @ x, changes)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("columns", [1, 63, LEAST_DIVIDED - 1, LEAST_DIVIDED, LEAST_DIVIDED + 1, 1500])
def test_a_damped_matrix_is_inverted(columns, random):
    matrix = well_conditioned(columns, random)
    expected = torch.linalg.inv(matrix.double())
    assert invert_damped_(matrix)
    assert (matrix - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("columns", [63, LEAST_DIVIDED, 1500])
def test_an_inverse_that_will_be_rounded_is_as_close_as_its_rounding(columns, random):
    matrix = well_conditioned(columns, random)
    expected = torch.linalg.inv(matrix.double())
    assert invert_damped_(matrix, torch.bfloat16)
    assert ((matrix.diagonal() - expected.diagonal()) / expected.diagonal()).abs().max() < 1e-3
    for part in (matrix, expected):
        part.diagonal().zero_()
    assert (matrix - expected).norm() < 2.0**-8 * expected.norm()


@pytest.mark.parametrize("columns", [1, 63, LEAST_DIVIDED - 1, LEAST_DIVIDED, LEAST_DIVIDED + 1, 1500])
def test_the_factor_of_the_inverse(columns, random):
    x = torch.randn(2 * columns, columns, generator=random, dtype=torch.float64) + 0.5
    matrix = x.T @ x
    upper = matrix.clone()
    assert inverse_factor_(upper)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()  # so there is only one such factor
    torch.testing.assert_close(upper @ matrix @ upper.T, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("columns", [5, 700])
@pytest.mark.parametrize("where", ["first", "last"])
def test_what_is_not_positive_definite_has_no_inverse(columns, where, random):
    matrix = well_conditioned(columns, random)
    at = 0 if where == "first" else columns - 1
    matrix[at, at] = -1.0
    assert not inverse_factor_(matrix.clone())
    assert not invert_damped_(matrix)


@pytest.mark.parametrize("columns", [5, 700])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_inverse(columns, value, random):
    matrix = well_conditioned(columns, random)
    matrix[columns - 1, 1] = matrix[1, columns - 1] = value
    factor = matrix.clone()
    assert not inverse_factor_(factor) or not torch.isfinite(factor.sum())  # as its caller asks
    assert not invert_damped_(matrix)
