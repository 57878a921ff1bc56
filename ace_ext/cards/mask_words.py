"""Describes in words what chose a mask, and which of the paper's scores (arXiv 2505.21987: cosine and variance) it
used."""

from ace_ext.errors import InputError
from ace_ext.pruning.method import parse

_PAPER = {
    "cosp": "the paper's cosine score",
    "cosp-exact": "the paper's cosine score, without its approximation",
    "varp": "the paper's variance score",
    "stade": "standard deviations, the formula of the paper's variance score",
    "cosvar": "variances of tokens weighted as in the paper's cosine score",
    "norm-cosvar": "norms, and variances of tokens weighted as in the paper's cosine score",
    "ace": "the product of the paper's two scores, cosine and variance",
}
"""Descriptions of the metrics that are the paper's scores or are built from them."""

UNUSED = "the paper's scores were not used"


def mask_words(method: str) -> str:
    """What chose the mask of a method, given as the text of its stages.

    ``"ADMM's remaining error; the paper's scores were not used"``, for example.
    """
    try:
        stages = parse(method)
    except InputError:  # a metric that is a function, or a stage that is not registered here
        return f"a metric of the caller's; {UNUSED}"
    if not stages.prunes:
        return f"none, because no weight was removed; {UNUSED}"
    if stages.score is None:
        assert stages.solve is not None  # else nothing chooses a mask
        stage = stages.solve.label.upper()
        weighted = getattr(stages.solve, "gram", None) == "cosine"
        return f"{stage}'s remaining error{' of tokens weighted as in the cosine score' if weighted else ''}; {UNUSED}"
    label = stages.score.label
    after = f", exchanged by {stages.refine.label}" if stages.refine is not None else ""
    return f"{_PAPER[label]}{after}" if label in _PAPER else f"{label} scores{after}; {UNUSED}"
