"""Records of a pruning run. They are written beside the model as JSON, and shown as a short table.

May import ``dense_weights`` and ``errors``.
"""

from ace_ext.records.agreement import LOWER_IS_BETTER, Agreement
from ace_ext.records.healing import KL, STATES, Healing, HeldOutPerplexity, figure_text, finite
from ace_ext.records.matrices import BlockReport, MatrixReport, Solution, Tuning
from ace_ext.records.removed import CutBlock, DroppedBlock, GoneExperts, Removed, TriedRemoval
from ace_ext.records.report import FORMAT, REPORT_NAME, PruneReport
from ace_ext.records.tables import RoundedTable

__all__ = [
    "FORMAT",
    "KL",
    "LOWER_IS_BETTER",
    "REPORT_NAME",
    "STATES",
    "Agreement",
    "BlockReport",
    "CutBlock",
    "DroppedBlock",
    "GoneExperts",
    "Healing",
    "HeldOutPerplexity",
    "MatrixReport",
    "PruneReport",
    "Removed",
    "RoundedTable",
    "Solution",
    "TriedRemoval",
    "Tuning",
    "figure_text",
    "finite",
]
