"""The names of the kinds of statistics. Stages request them; collectors and statistics files hold them.

Notation: inputs ``X [T, d_in]`` of a Linear, dense outputs ``A [T, d_out]``, ``r_t = 1 / ‖A_t‖²``.
"""

INPUT = "input"
"""Welford moments of each input column."""
WEIGHTED = "weighted"
"""Welford moments of each input column, token t weighted by ``r_t``."""
MOMENT = "moment"
"""The cross moment ``Σ_t r_t² A_ti² X_tj²``, as large as the weight."""
GRAM = "gram"
"""``Σ_t X_t X_tᵀ``, the Gram matrix."""
COSINE_GRAM = "cosine-gram"
"""``Σ_t r_t X_t X_tᵀ``, the Gram matrix with weighted tokens."""
SKETCH = "sketch"
"""``GRAM`` approximated by a diagonal and a few directions (:mod:`ace_ext.pruning.sketch`)."""

GRAMS = frozenset({GRAM, COSINE_GRAM})
"""The kinds that are ``[d_in, d_in]``."""
