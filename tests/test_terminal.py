"""Tables: numbers and labels whole on any terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from megacode.terminal import print_table


@pytest.mark.parametrize("width", [20, 80, 200])
def test_numbers_and_labels_are_never_cut_and_prose_wraps(width: int) -> None:
    table = Table(box=None)
    table.add_column("phase and name", no_wrap=True)
    table.add_column("why")
    for number in range(6):
        table.add_column(f"a long head {number}", justify="right")
    prose = "a sentence that takes several lines where the terminal is narrow"
    table.add_row("a label of words", prose, *(f"{number}23,456,789" for number in range(6)))
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    print_table(console, table)
    printed = out.getvalue()
    assert "…" not in printed and "a label of words" in printed and "a long head 5" in printed
    assert all(f"{number}23,456,789" in printed for number in range(6))
    assert (prose in printed) == (width == 200)
    assert set(prose.split()) <= set(printed.split())
    assert console.width == width
