"""The walk over a model's blocks: the order in which statistics are collected, matrices pruned and hidden states moved
to the next block.

The engine reaches journals, statistics files, other processes and progress displays only through
:mod:`ace_ext.engine.protocols`. May import ``pruning``, ``models``, ``ops`` and the layers below them; nothing of
``runs``.
"""
