"""Running packed models: packed Linears and embeddings, loading packed folders.

May import ``packed``, ``data`` and the layers below.
"""

from ace_ext.runtime.embedding import PackedEmbedding
from ace_ext.runtime.linear import PackedLinear, QuantizedLinear
from ace_ext.runtime.loading import load_packed, open_model

__all__ = ["PackedEmbedding", "PackedLinear", "QuantizedLinear", "load_packed", "open_model"]
