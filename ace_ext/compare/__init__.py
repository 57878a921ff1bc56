"""Comparisons of pruning methods: the grid of runs, the runs, the journal that records them, and tables.

It may import ``runs``, ``engine``, ``pruning``, ``data``, ``models``, ``ops`` and the modules below them, but neither
``reporting`` nor ``cli``.
"""
