"""What many runs say together.

1. `sweep` makes the cells of a sweep file, `state` reads how far they are, `pool` trains them here,
   `array` on Slurm, `tables` shows them on a terminal.
2. `results` collects what finished cells measured, `compare` sets arms against each other, `page`
   draws it.
3. `statistics` gives intervals over seeds and items, paired differences, slopes, adjusted p values.
4. `budgets` turns a total and a share into tokens of every source.
5. `mixing_law` fits losses against shares and proposes the next mixture.
"""
