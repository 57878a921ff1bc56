"""The packed formats. Each file defines one as ``CODEC``. May import ``_codec`` and ``matrix`` of ``packed``, and the
layers below ``models``."""
