"""The maths of pruning: statistics, criteria (scores), masks, solvers, and the configuration that chooses among them.

Reads no file and knows no tokenizer. May import ``ops``, ``models`` and what lies below them.
"""
