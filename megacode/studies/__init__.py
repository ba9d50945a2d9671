"""What many runs say together.

1. `sweep` makes the cells of a sweep file, `state` reads how far they are, `pool` trains them here,
   `array` on Slurm, `tables` shows them on a terminal.
2. `results` collects what finished cells measured, `compare` sets arms against each other, `page`
   draws it.
3. `mixing_table` reads shares and losses, `mixing_law` fits one to the other and finds the best
   mixture, `mixing_phases` writes it as a recipe, `mixing_plot` draws it.
"""
