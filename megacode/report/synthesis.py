"""A synthesis in a terminal: an estimate before, a live line, tables at the end; and a page of
rows and rejects to read."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from megacode.files import write_text
from megacode.report import palette
from megacode.report.page import environment
from megacode.synthesize.estimate import Estimate
from megacode.synthesize.make import Counts, OpenSynthesis, Result, synthesize
from megacode.synthesize.output import Files
from megacode.synthesize.served import Totals
from megacode.terminal import count, duration, print_table, table_of
from megacode.version import __version__

_SHOWN = 12
"""Rows on the page, and rejects of each reason."""
_SAID_EVERY = 30.0


def print_estimate(opened: OpenSynthesis, found: Estimate, console: Console) -> None:
    """What a synthesis asks for, and at most costs."""
    table = table_of(
        f"{opened.file.name}: {opened.file.operator}", "model", "requests", "tokens in",
        "tokens out", "price", "at its limits",
    )  # fmt: skip
    for role, one in found.roles.items():
        table.add_row(
            f"{role} ({opened.file.models[role].model})",
            f"{one.requests:,}",
            count(one.prompt),
            count(one.completion),
            _money(one.price),
            duration(one.minutes / 1440) if one.minutes else "-",
        )
    known = f"; the journal has {found.known:,} replies already" if found.known else ""
    table.caption = (
        f"{found.candidates:,} candidates of {found.records:,} records{known}. Upper bounds: every "
        "step is asked, and every reply is as long as max_tokens allows\n(512 tokens where it is "
        "not given)."
    )
    print_table(console, table)


def synthesize_visibly(opened: OpenSynthesis, overwrite: bool, console: Console) -> Result:
    """`synthesize` with a live line, then tables and a page of samples."""
    started = time.monotonic()
    bar = Progress(
        BarColumn(bar_width=16), TextColumn("{task.description}", markup=False), console=console,
        refresh_per_second=4, transient=True,
    )  # fmt: skip
    task = bar.add_task("waiting for the first reply", total=opened.target)
    spoke = started

    def on_progress(counts: Counts, totals: Mapping[str, Totals]) -> None:
        nonlocal spoke
        now = time.monotonic()
        if console.is_terminal or now - spoke > _SAID_EVERY:
            line = _line(opened, counts, totals, now - started)
            bar.update(task, completed=counts.accepted, description=line)
            if not console.is_terminal:
                spoke = now
                console.print(line, soft_wrap=True)

    def on_event(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if console.is_terminal:
        bar.start()
    try:
        result = asyncio.run(synthesize(opened, overwrite, on_event, on_progress))
    finally:
        bar.stop()
    if result.kept:
        said = "kept; already made from these inputs with these settings"
        console.print(f"{result.files.rows}: {said}", soft_wrap=True)
        return result
    _print_result(opened, result, time.monotonic() - started, console)
    return result


def _line(
    opened: OpenSynthesis, counts: Counts, totals: Mapping[str, Totals], seconds: float
) -> str:
    rate = counts.accepted / max(seconds, 1e-3)
    of = f" of {opened.target:,}" if opened.target else ""
    share = counts.accepted / max(counts.candidates, 1)
    tokens: float = sum(one.this_run.prompt + one.this_run.completion for one in totals.values())
    tokens /= max(seconds, 1e-3)
    money = sum(one.everything.money for one in totals.values())
    flying = sum(one.in_flight for one in totals.values())
    parts = [
        f"{counts.accepted:,}{of} rows", f"{rate:,.1f} rows/s", f"{count(tokens)} tokens/s",
        f"accepted {share:.0%}", f"{flying} in flight",
    ]  # fmt: skip
    if money:
        parts.append(_money(money))
    if opened.target and rate:
        left = (opened.target - counts.accepted) / rate
        parts.append(f"{duration(left / 86400)} left")
    return "  ".join(parts)


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars else "-"


def _print_result(opened: OpenSynthesis, result: Result, seconds: float, console: Console) -> None:
    counts = result.counts
    print_table(console, _outcomes(counts))
    print_table(console, _usage(opened, result))
    share = counts.accepted / counts.candidates
    steps = counts.steps / max(counts.accepted, 1)
    console.print(
        f"{counts.accepted:,} rows of {counts.candidates:,} candidates ({share:.1%}) in "
        f"{duration(seconds / 86400)}, {steps:.1f} lines an answer: {result.files.rows}",
        soft_wrap=True,
    )
    if opened.target and counts.accepted < opened.target:
        limit = counts.candidates == opened.most
        why = "`candidates` is reached" if limit else "the inputs have no more candidates"
        console.print(f"{opened.target:,} rows were asked for; {why}", soft_wrap=True)
    page = write_samples(opened, result)
    console.print(f"samples to read: {page}", soft_wrap=True)


def _outcomes(counts: Counts) -> Table:
    table = table_of("candidates", "outcome", "count", "share")
    for reason, number in (("accepted", counts.accepted), *counts.rejected.most_common()):
        table.add_row(reason, f"{number:,}", f"{number / counts.candidates:.1%}")
    for reason, number in counts.skipped.most_common():
        table.add_row(f"records passed over: {reason}", f"{number:,}", "")
    return table


def _usage(opened: OpenSynthesis, result: Result) -> Table:
    table = table_of(
        "models", "model", "replies", "from the journal", "tokens in", "tokens out",
        "tries again", "price",
    )  # fmt: skip
    for role, one in result.totals.items():
        again = ", ".join(f"{number:,} {why}" for why, number in one.retries.items())
        guessed = "about " if one.estimated else ""
        table.add_row(
            f"{role} ({opened.file.models[role].model})",
            f"{one.replies:,}",
            f"{one.hits:,}",
            f"{guessed}{count(one.everything.prompt)}",
            f"{guessed}{count(one.everything.completion)}",
            again or "-",
            _money(one.everything.money),
        )
    return table


def write_samples(opened: OpenSynthesis, result: Result) -> Path:
    """A page with the first rows and some rejects of every reason.

    Returns:
        Its path, in the output's folder.
    """
    files = result.files
    path = files.manifest.with_name(files.manifest.stem.replace("manifest", "samples") + ".html")
    rejects: dict[str, list[Any]] = defaultdict(list)
    for one in _records(files, "rejects"):
        rejects[one["reason"]].append(one)
    page = (
        environment()
        .get_template("synthesis.html.j2")
        .render(
            title=opened.file.name,
            file=opened.file,
            counts=result.counts,
            rows=list(_records(files, "rows"))[:_SHOWN],
            rejects={why: some[:_SHOWN] for why, some in rejects.items()},
            palette=palette,
            version=__version__,
        )
    )
    write_text(path, page)
    return path


def _records(files: Files, which: str) -> list[Any]:
    path = files.rows if which == "rows" else files.rejects
    with open(path, "rb") as lines:
        return [json.loads(line) for line in lines]
