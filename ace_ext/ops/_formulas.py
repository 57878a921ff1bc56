"""The formulas by which the ops score a weight, and the names of metrics that version 0.1 took in their place."""

import warnings

FORMULAS = ("magnitude", "scaled", "ria", "cosp", "cosp_exact", "score")
"""Names of the formulas: ``kFormulas`` in ``csrc/core/score.h``."""

FORMULA_OF_OLD_NAME = {
    "wanda": "scaled",
    "stade": "scaled",
    "varp": "scaled",
    "cosvar": "scaled",
    "ace": "scaled",
    "cosp+varp": "cosp",
    "cosp-exact": "cosp_exact",
}


def formula_name(name: str) -> str:
    """``name`` as the registered ops take it: itself, or with a warning the formula of a metric of version 0.1."""
    formula = FORMULA_OF_OLD_NAME.get(name)
    if formula is None:
        return name
    warnings.warn(
        f"the ops take the name of a formula: {formula!r} in place of the metric {name!r}",
        DeprecationWarning,
        stacklevel=4,  # the caller of the op: above this function, the op and its no_grad wrapper
    )
    return formula
