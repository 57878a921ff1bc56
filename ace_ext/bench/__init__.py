"""``ace-prune bench``: packed folders beside the dense one, and beside other engines.

``pair.py`` compares one packed folder with its dense one in one process, logits included. ``contest.py`` measures any
number of candidates, each in a process of its own. May import ``runtime`` and the layers below.
"""
