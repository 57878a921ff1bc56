"""Comparisons of pruning methods: the grid of runs, the runs themselves, the journal that records them, and tables.

May import ``runs``, ``engine``, ``pruning``, ``data``, ``models``, ``ops`` and the modules below them, but neither
``reporting`` nor ``cli``.
"""
