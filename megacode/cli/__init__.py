"""The command line.

1. `main` finds the verb and imports its module.
2. The module adds its arguments; those that several verbs have are in `arguments`.
3. `run` makes one call to the room that does the work, and prints what a person wants to see.
"""
