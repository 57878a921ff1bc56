"""How far ADMM believes the calibration text: what is added to the Gram matrix before and after its normalisation."""

from torch import Tensor

ADMM_DAMPING = 0.1
"""The default damping of ADMM, with which its penalty parameter is 1 as in arXiv 2401.02938."""

ADMM_FLOOR = 0.1
"""The default of its option ``floor``, from measurements on three models (``docs/results.md``)."""


def penalty(damping: float) -> float:
    """ADMM's penalty parameter ρ, for a Gram matrix normalised to a diagonal of ones and this damping: in proportion to
    the damped diagonal, and 1 with ``ADMM_DAMPING``.

    Without correlations between columns the multiplier of a removed weight w ends at ``(1 + damping) / ρ · w``. With ρ
    far below ``1 + damping`` removed weights would therefore outgrow kept ones, and the mask would not settle.
    """
    return (1 + damping) / (1 + ADMM_DAMPING)


def floor_energy(energies: Tensor, floor: float) -> Tensor:
    """``floor`` times the geometric mean of those ``energies G_jj [d]`` that are not 0: ``[]`` float64, 0 without any.

    It is added to each column's energy. A column that is quiet in the calibration text need not be so in other text,
    where large changes of its weights, which cost nothing here, would do harm. The geometric mean is that of a usual
    column, whatever the few with very large inputs have.
    """
    seen = energies > 0
    count = seen.sum()
    mean = energies.double().log().masked_fill(~seen, 0.0).sum() / count.clamp_min(1)
    return floor * mean.exp() * (count > 0)
