"""The main job from nothing.

1. `corpora` gathers what every Python installation carries (`docstrings` is its prose) and tokenizes it.
2. `run` trains the recipe, writes samples and the report.
"""
