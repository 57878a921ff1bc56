"""Reports: HTML pages of a run and of a comparison, from the templates beside this file, and their plots.

May import ``compare`` and the modules below it, but not ``cli``.
"""
