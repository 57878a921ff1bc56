"""Named settings: keyword arguments of :class:`ace_ext.PruneConfig`, without sparsity or pattern."""

PRESETS: dict[str, dict] = {
    "fast": {"metric": "ace"},
    "balanced": {"update": "admm"},
    "best": {"update": "admm", "tune_epochs": 6},
}
"""By how much time they take: a metric alone; weights updated; weights updated and each block tuned."""

PUBLISHED: dict[str, dict] = {
    "wanda": {"metric": "wanda", "order": "block"},
    "sparsegpt": {"update": "obs", "group": "matrix", "order": "block", "gram": "plain"},
    "admm": {"update": "admm", "saliency": "magnitude", "iterations": 30, "order": "block"},
}
"""Other people's methods as they published them."""
