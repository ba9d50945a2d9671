"""Tables, numbers and progress on terminals, in pipes and in files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PIPE = 140
"""Table width when stdout is not a terminal."""
_PROSE = 30
"""A column of prose is not made narrower than this."""


def table_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE)


def print_table(console: Console, table: Table) -> None:
    """Print a table; numbers (right-justified columns) and labels (`no_wrap`) are never cut.

    Only columns of prose shrink. If that is not enough, the terminal wraps the table's lines.
    """
    unlimited = console.options.update(width=10_000)
    needed = console.measure(table, options=unlimited).maximum
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"
        if not column.no_wrap and column.width is None:
            cells = [
                console.measure(cell, options=unlimited).maximum
                for cell in (column.header, *column.cells)
            ]
            needed -= max(max(cells) - _PROSE, 0)
    width = console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width


def count(number: float) -> str:
    """1,234 or 344.8 B: whole numbers below a million, else four digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size * 0.9999:
            scaled = number / size
            return f"{scaled:,.{3 if scaled < 10 else 2 if scaled < 100 else 1}f} {suffix}"
    return f"{number:,.0f}"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    if days * 24 >= 2:
        return f"{days * 24:.1f} hours"
    if days * 1440 >= 2:
        return f"{days * 1440:.1f} minutes"
    return f"{days * 86400:.1f} seconds"


def table_of(title: str, *columns: str, left: int = 1, prose: bool = False) -> Table:
    """A table whose first `left` columns are words; with `prose` the last of these may wrap."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=SIMPLE_HEAD,
        header_style="dim",
    )
    table.show_header = any(columns)
    for number, column in enumerate(columns):
        table.add_column(
            column, justify="left" if number < left else "right", no_wrap=number < left - prose
        )
    return table


@contextmanager
def progress_bar(title: str, total: int, what: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error; without a terminal, a line now and then.

    Gives a function that takes how many more are done.
    """
    console = Console(stderr=True, highlight=False)
    started = spoke = time.monotonic()
    done = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bar = Progress(
        *columns,
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(title, total=total, rate="")

    def advance(more: int) -> None:
        nonlocal done, spoke
        done += more
        now = time.monotonic()
        speed = done / max(now - started, 1e-3)
        rate = f"{speed / 1e6:,.1f} {'MB' if what == 'bytes' else f'M {what}'}/s"
        bar.update(task, completed=done, rate=rate)
        if not console.is_terminal and now - spoke > 30:
            spoke = now
            console.print(f"{title}: {done / max(total, 1):.0%}  {rate}")

    if not console.is_terminal:
        yield advance
        return
    with bar:
        yield advance
