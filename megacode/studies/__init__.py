"""What many runs say together.

1. `statistics` gives intervals over seeds and items, paired differences, slopes, adjusted p values.
2. `budgets` turns a total and a share into tokens of every source.
3. `mixing_law` fits losses against shares and proposes the next mixture.
"""
