"""The main job from nothing.

1. `corpora` gathers code and text that every Python installation carries (`docstrings` finds its
   prose) and tokenizes both.
2. `__main__` trains the recipe, writes samples and the report.
"""
