"""Functions of a corpus -> pairs: a query with equivalent and non-equivalent candidates.

1. `languages` parses, `functions` finds functions and their tokens.
2. `renaming` and `rewriting` write equivalent candidates, `corruptions` others; `proof` runs them.
3. `make` reads a corpus part by part (as `corpus.preprocess` does) and writes `records`.
"""
