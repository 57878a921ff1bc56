"""ADMM's regularisation: what is added to the Gram matrix's diagonal before and after its normalisation."""

from torch import Tensor

ADMM_DAMPING = 0.1
"""The default damping of ADMM. With it the penalty parameter is 1, as in arXiv 2401.02938."""

ADMM_FLOOR = 0.1
"""The default of ADMM's option ``floor``, from measurements on three models (``docs/trials.md``)."""


def penalty(damping: float) -> float:
    """ADMM's penalty parameter ρ for a Gram matrix with a diagonal of ones and this damping. It is proportional to the
    damped diagonal. With ``ADMM_DAMPING`` it is 1.

    If columns are uncorrelated, the multiplier of a removed weight w converges to ``(1 + damping) / ρ · w``. If ρ were
    far below ``1 + damping``, removed weights would outgrow kept ones, and the mask would not converge.
    """
    return (1 + damping) / (1 + ADMM_DAMPING)


def floor_energy(energies: Tensor, floor: float) -> Tensor:
    """``floor`` times the geometric mean of those ``energies G_jj [d]`` that are not 0: ``[]`` float64, 0 if all are 0.

    It is added to the energy of each column. A column with small inputs in the calibration text may have large inputs
    in other text, and large changes of its weights would then do harm. The geometric mean is the energy of a typical
    column: a few columns with very large inputs hardly change it.
    """
    seen = energies > 0
    count = seen.sum()
    mean = energies.double().log().masked_fill(~seen, 0.0).sum() / count.clamp_min(1)
    return floor * mean.exp() * (count > 0)
