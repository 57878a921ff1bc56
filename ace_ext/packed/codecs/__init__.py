"""The packed formats. Each file defines one as ``CODEC``. May import ``_codec``, ``matrix`` and ``quantized_matrix`` of
``packed``, and the layers below ``models``."""
