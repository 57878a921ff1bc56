"""The table of metrics: what each reads from the statistics, and the column factor it hands to the ops.

The score of one weight is a functor of ``csrc/core/score.h``; here stands what is the same for a whole column.
Notation: ``W [d_out, d_in]``, inputs ``X [T, d_in]``, dense outputs ``A = X Wᵀ``, ``r_t = 1 / ‖A_t‖²``; ``σ_j`` is the
standard deviation of ``X_j`` over tokens, ``σʳ_j = sqrt(Σ_t r_t (X_tj - m_j)²)`` with ``m_j`` the ``r``-weighted mean.
"""

INPUT, WEIGHTED, MOMENT = "input", "weighted", "moment"
"""Kinds of statistics: moments of the input; those weighted by ``r_t``; the cross moment ``Σ_t r_t² A_ti² X_tj²``."""
GRAM, COSINE_GRAM = "gram", "cosine-gram"
"""Two more, for the solvers: ``Σ_t X_t X_tᵀ``, and the same weighted by ``r_t``."""
