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
"""``Σ_t s_t² X_t X_tᵀ``, the Gram matrix with weighted tokens: ``s_t`` is the power of two nearest to ``1 / ‖A_t‖``."""
ROUNDING_GRAM = "rounding-gram"
"""The same with :data:`ace_ext.pruning.statistics.FIRST_TOKEN` times ``s_t`` for the first token of each sample of a
causal language model."""
SHARED_GRAM = "shared-gram"
"""``COSINE_GRAM`` with ``A`` of the first Linear that reads the input; Linears with the same input share it."""
SKETCH = "sketch"
"""``SHARED_GRAM`` approximated by a diagonal and a few directions (:mod:`ace_ext.pruning.sketch`)."""

OWN_GRAMS = frozenset({COSINE_GRAM, ROUNDING_GRAM})
"""Those of which each Linear has its own."""
GRAMS = OWN_GRAMS | {GRAM, SHARED_GRAM}
"""The kinds that are ``[d_in, d_in]``."""
