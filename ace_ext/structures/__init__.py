"""Removing whole structures: neurons of the feed-forward parts, and blocks. A smaller model of the same class stays.

What belongs to a structure is not looked up by family: a number of the configuration is changed, a model of the class
is laid out without memory, and its shapes are compared (:mod:`ace_ext.structures.search`). The result is tried on a few
tokens before anything is removed. May import ``models``, ``pruning``, and the layers below.
"""
