"""Runs on files: from a checkpoint to a pruned folder, within a memory budget, resumable; plans and proofs of it.

May import ``engine``, ``formats``, ``data`` and what lies below them.
"""
