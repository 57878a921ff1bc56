"""The walk over a model's blocks: in which order statistics are taken, matrices pruned and hidden states moved on.

Files, statistics files and whoever watches are asked through :mod:`ace_ext.engine.protocols`. May import ``pruning``,
``models``, ``ops`` and what lies below them; nothing of ``runs``.
"""
