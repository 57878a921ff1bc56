"""The packed formats, one file each, which defines ``CODEC``. May import ``_codec`` and ``matrix`` of ``packed``, and
what lies below ``models``."""
