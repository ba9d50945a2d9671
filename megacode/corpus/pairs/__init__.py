"""Functions of a corpus -> pairs: a query with equivalent and non-equivalent candidates.

1. `languages` parses, `functions` finds functions and their tokens.
2. `renaming` gives a function's own names others (`scopes/` says per language where a name is
   defined), `rewriting` rewrites Python, `corruptions` writes candidates that are not equivalent.
3. `proof` runs programs in the sandbox, where `running` compares them.
4. `drafts` makes records of the parts of a corpus (as in `corpus.preprocess`); `make` adds what
   takes other records, and writes the file. `request` says what is asked for, `records` what is
   written.
"""
