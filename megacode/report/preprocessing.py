"""Preprocessing as people see it: a progress bar, the table at the end, the plot of document lengths."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

from megacode.corpus.preprocess import tokenize as part
from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.run import preprocess
from megacode.data import indexed
from megacode.files import remove_left_over
from megacode.terminal import print_table


def preprocess_visibly(
    request: Request,
    workers: int,
    console: Console,
    title: str | None = None,
    share: tuple[int, int] | None = None,
    plot: bool = True,
) -> Result:
    """`preprocess` with a progress bar (a line now and then where there is no terminal), a table and a plot after it."""
    started = time.monotonic()
    name = request.name
    with _progress(console, title or name.name) as (show_stage, on_progress):

        def on_stage(stage: str, total_bytes: int, done_bytes: int) -> None:
            show_stage(stage, total_bytes, done_bytes)
            if (
                plot and stage == "tokenizing"
            ):  # workers are busy and this process is not: what the plot will need
                threading.Thread(target=_import_plotting, daemon=True).start()

        result = preprocess(request, workers, share, on_stage, on_progress)
    seconds = time.monotonic() - started
    if result.kept:
        console.print(
            f"{name}: kept; already made from these files with these settings", soft_wrap=True
        )
    elif result.parts_kept:
        console.print(
            f"{name}: {result.parts_kept} of {result.parts} parts were done before and kept"
        )
    if not result.outputs:
        assert share
        console.print(
            f"{name}: --shard {share[0]}/{share[1]} is done; the last shard to finish puts the datasets together",
            soft_wrap=True,
        )
        return result
    picture = indexed.with_ending(name, ".lengths.png")
    remove_left_over(picture)
    if plot and (not result.kept or not picture.exists()):
        from megacode.corpus.inspect import open_dataset, statistics
        from megacode.report.document_lengths import plot_lengths

        made = result.outputs.values()
        plot_lengths(
            {_shown(prefix): statistics(open_dataset(prefix)).histogram for prefix in made}, picture
        )
    print_table(console, results_table(result, None if result.kept or share else seconds))
    if plot:
        console.print(f"document lengths: {_shown(picture)}")
    return result


def _import_plotting() -> None:
    for module in ("matplotlib.backends.backend_agg", "megacode.report.drawing"):
        importlib.import_module(module)


def results_table(result: Result, seconds: float | None) -> Table:
    """Documents, tokens and so on by dataset, then what was left out."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.add_column("dataset", overflow="fold")
    for name in ("documents", "tokens", "MB", "bytes/token", "longest"):
        table.add_column(name, justify="right")
    for group, prefix in result.outputs.items():
        n = result.counts.groups[group]
        table.add_row(
            _shown(prefix),
            f"{n.documents:,}",
            f"{n.tokens:,}",
            f"{n.bytes / 1e6:,.1f}",
            f"{n.bytes / n.tokens:.2f}",
            f"{n.longest:,}",
        )
    notes = []
    if seconds is not None and not result.parts_kept:
        total = result.counts.total
        notes.append(
            f"{seconds:.1f} s, {total.bytes / 1e6 / seconds:,.1f} MB/s, {total.tokens / seconds:,.0f} tokens/s"
        )
    if result.counts.checked:
        notes.append(
            f"checked: {result.counts.checked:,} documents at random have the reference library's ids"
        )
    if result.counts.exact:
        notes.append(f"tokenized by the reference library alone: {result.counts.exact}")
    for what, reasons in (("bad", result.counts.bad), ("passed over", result.counts.passed_over)):
        notes += [f"{what}: {count:,} × {reason}" for reason, count in reasons.most_common(8)]
    if result.counts.repaired:
        notes.append(
            f"repaired: {result.counts.repaired:,} documents with lone surrogates, now U+FFFD"
        )
    if result.quarantine:
        notes.append(f"left out, with reasons: {_shown(result.quarantine)}")
    table.caption = "\n".join(notes)
    return table


def _shown(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)


@contextmanager
def _progress(
    console: Console, title: str
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[part.PartProgress], None]]]:
    """Callbacks for `preprocess` that move a bar. The bar goes by bytes on disk, the rates by text and tokens."""
    totals = {"bytes": 0, "tokens": 0, "bad": 0}
    started = spoke = time.monotonic()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(title, total=None, rates="")

    def rates() -> str:
        seconds = max(time.monotonic() - started, 1e-3)
        bad = f"  {totals['bad']:,} bad" if totals["bad"] else ""
        return f"{totals['bytes'] / 1e6 / seconds:.1f} MB/s  {totals['tokens'] / seconds / 1e3:,.0f} k tokens/s{bad}"

    def on_stage(stage: str, total_bytes: int, done_bytes: int) -> None:
        shown = title if stage == "tokenizing" else f"{title}: {stage}"
        bar.reset(task, total=total_bytes, completed=done_bytes, description=shown, rates="")

    def on_progress(progress: part.PartProgress) -> None:
        nonlocal spoke
        totals["bytes"] += progress.text_bytes
        totals["tokens"] += progress.tokens
        totals["bad"] += progress.bad
        bar.update(task, advance=progress.input_bytes, rates=rates())
        if not console.is_terminal and time.monotonic() - spoke > 30:
            spoke = time.monotonic()
            console.print(f"{bar.tasks[0].description}: {bar.tasks[0].percentage:.0f} %  {rates()}")

    if not console.is_terminal:
        yield on_stage, on_progress
        return
    with bar:
        yield on_stage, on_progress
