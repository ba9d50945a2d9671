"""Tables on terminals, in pipes and in files."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

PIPE = 140
"""Characters in a line where nobody says: a pipe has no width of its own."""
_PROSE = 30
"""A column of prose is not made narrower than this."""


def table_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE)


def print_table(console: Console, table: Table) -> None:
    """Print a table without cutting a number (a right-justified column) or a label (`no_wrap`) short.

    Only prose gives way. Where that is not enough, the table is wider than the terminal, which wraps its lines.
    """
    unlimited = console.options.update(width=10_000)
    needed = console.measure(table, options=unlimited).maximum
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
        if not column.no_wrap and column.width is None:
            cells = [console.measure(cell, options=unlimited).maximum for cell in (column.header, *column.cells)]
            needed -= max(max(cells) - _PROSE, 0)
    width = console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width
