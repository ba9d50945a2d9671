"""Pairs of functions that do the same, and of functions that do not.

1. `functions.py` cuts the functions out of a file, in the languages of `languages.py`.
2. `renaming.py` gives a function's own names other names; `scopes/` says per language where a name
   is bound.
"""
