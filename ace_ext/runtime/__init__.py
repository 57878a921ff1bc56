"""Running packed models: packed Linears, loading packed folders.

May import ``packed``, ``data`` and the layers below.
"""

from ace_ext.runtime.linear import PackedLinear, QuantizedLinear
from ace_ext.runtime.loading import load_packed, open_model

__all__ = ["PackedLinear", "QuantizedLinear", "load_packed", "open_model"]
