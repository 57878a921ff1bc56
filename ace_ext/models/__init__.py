"""Models of transformers: opening them, their decoder blocks, fused experts, and their weights in safetensors files.

A model family is never named here: blocks and weights are found by structure. All that is private or version-dependent
in transformers is in :mod:`ace_ext.models._transformers`.

May import ``ops`` and the modules below it (``errors``, ``version``, ``records``, ``fingerprint``,
``process_memory``), nothing else of ace_ext.
"""
