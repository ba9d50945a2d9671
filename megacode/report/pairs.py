"""Pairs in a terminal: progress bars and a table when they are made, two columns and a diff when
they are shown."""

from __future__ import annotations

import difflib
import re
from contextlib import ExitStack

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megacode.corpus.pairs.make import make_pairs
from megacode.corpus.pairs.records import RUN, PairRecord
from megacode.corpus.pairs.request import PairRequest, PairResult
from megacode.terminal import print_table, progress_bar, table_of

WIDTH = 100
"""Columns that a pair takes."""
_WORD = re.compile(r"\w+|\s+|[^\w\s]")


def make_pairs_visibly(request: PairRequest, workers: int, console: Console) -> PairResult:
    """`make_pairs` with progress bars, then a table of what was made and what was left out."""
    with ExitStack() as bars:
        advance = bars.enter_context(progress_bar(request.name.name, 0))

        def on_stage(stage: str, size: int) -> None:
            nonlocal advance
            bars.close()
            advance = bars.enter_context(progress_bar(f"{request.name.name}: {stage}", size))

        result = make_pairs(request, workers, on_stage, lambda size: advance(size))  # noqa: PLW0108
    if result.kept:
        said = "kept; already made from these files with these settings"
        console.print(f"{request.output}: {said}", soft_wrap=True)
    elif result.parts_kept:
        said = f"{result.parts_kept} of {result.parts} parts were done before and kept"
        console.print(f"{request.output}: {said}", soft_wrap=True)
    print_table(console, _made(request, result))
    if result.counts.left_out:
        print_table(console, _left_out(result))
    if result.quarantine:
        console.print(f"records that could not be read: {result.quarantine}", soft_wrap=True)
    return result


def _made(request: PairRequest, result: PairResult) -> Table:
    counts, splits = result.counts, list(request.outputs)
    table = table_of("", "", *(f"{one}{run}" for one in splits for run in ("", ", run")))
    table.add_row("records", *(cell for one in splits for cell in (f"{counts.records[one]:,}", "")))
    for kind in request.kinds:
        numbers = [
            counts.candidates[f"{one} {kind}{run}"] for one in splits for run in ("", f" {RUN}")
        ]
        table.add_row(kind, *(f"{number:,}" if number else "-" for number in numbers))
    table.caption = "\n".join(f"{one}: {path}" for one, path in request.outputs.items())
    return table


def _left_out(result: PairResult) -> Table:
    table = table_of("left out", "what", "count")
    for reason, number in result.counts.left_out.most_common():
        table.add_row(reason, f"{number:,}")
    return table


def print_pair(console: Console, pair: PairRecord) -> None:
    """The query beside each of its candidates; what differs is red on the left, green on the
    right."""
    facts = f"{pair.language}, group {pair.group}"
    console.print(Text(f"{pair.id}  {pair.name}  ({facts})", "bold"), soft_wrap=True)
    for one in pair.candidates:
        sort = "equivalent" if one.equivalent else "not equivalent"
        proof = ", by running" if one.proof else ""
        colour = "green" if one.equivalent else "red"
        console.print(Rule(Text(f"{one.kind}: {sort}{proof}", colour), style=colour), width=WIDTH)
        table = Table(box=None, show_header=False, width=WIDTH, pad_edge=False)
        for _ in range(2):
            table.add_column(width=WIDTH // 2 - 1, overflow="fold")
        for left, right in side_by_side(pair.query, one.text):
            table.add_row(left, right)
        console.print(table)


def side_by_side(before: str, after: str) -> list[tuple[Text, Text]]:
    """Lines of both, those that are alike in one row; words that differ are coloured."""
    old, new = before.expandtabs(4).split("\n"), after.expandtabs(4).split("\n")
    rows = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for at in range(max(b - a, d - c)):
            left, right = "".join(old[a:b][at : at + 1]), "".join(new[c:d][at : at + 1])
            rows.append((Text(left), Text(right)) if tag == "equal" else _marked(left, right))
    return rows


def _marked(left: str, right: str) -> tuple[Text, Text]:
    old, new = _WORD.findall(left), _WORD.findall(right)
    one, two = Text(), Text()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        one.append("".join(old[a:b]), "" if tag == "equal" else "bold red")
        two.append("".join(new[c:d]), "" if tag == "equal" else "bold green")
    return one, two
