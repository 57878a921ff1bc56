"""Text and token windows: where text comes from, calibration samples, and perplexity on held-out text.

May import ``models`` (for the type of a tokenizer and the names of a model's parts) and the modules below it (``ops``,
``errors``, ``version``, ``records``, ``fingerprint``, ``process_memory``), nothing else of ace_ext.
"""
