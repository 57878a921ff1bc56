"""Running packed models: Linears that multiply from packed weights, loading a packed folder, measuring it.

May import ``packed``, ``data`` and what lies below them.
"""

from ace_ext.runtime.linear import PackedLinear
from ace_ext.runtime.loading import load_packed, open_model

__all__ = ["PackedLinear", "load_packed", "open_model"]
