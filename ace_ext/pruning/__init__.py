"""The maths of pruning: statistics, scores, masks, the stages of a method, and the configuration.

It reads no files and uses no tokenizer. May import ``ops``, ``models`` and what lies below them.
"""
