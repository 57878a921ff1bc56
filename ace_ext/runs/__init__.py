"""Runs on files: prune a checkpoint into a folder within a memory budget, resume, plan a run, verify its output.

May import ``engine``, ``formats``, ``data`` and what lies below them.
"""
