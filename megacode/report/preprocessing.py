"""Preprocessing in a terminal: progress bars, a table at the end, a plot of document lengths."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megacode.corpus.inspect import open_dataset, statistics
from megacode.corpus.preprocess.request import Request, Result
from megacode.corpus.preprocess.run import preprocess
from megacode.corpus.preprocess.tokenize import PartProgress
from megacode.data import indexed
from megacode.files import remove_left_over
from megacode.terminal import print_table, progress_bar, table_of


def preprocess_visibly(
    request: Request,
    workers: int,
    console: Console,
    title: str | None = None,
    share: tuple[int, int] | None = None,
) -> Result:
    """`preprocess` with progress bars, then a table and a plot of its datasets."""
    started = time.monotonic()
    name = request.name
    with ExitStack() as bars:
        advance = bars.enter_context(progress_bar(title or name.name, 0))

        def on_stage(stage: str, total_bytes: int, done_bytes: int) -> None:
            nonlocal advance
            bars.close()
            shown = title or name.name
            shown += "" if stage == "tokenizing" else f": {stage}"
            advance = bars.enter_context(progress_bar(shown, total_bytes - done_bytes))

        def on_progress(progress: PartProgress) -> None:
            advance(progress.input_bytes)

        result = preprocess(request, workers, share, on_stage, on_progress)
    seconds = time.monotonic() - started
    said = ""
    if result.kept:
        said = "kept; already made from these files with these settings"
    elif result.parts_kept:
        said = f"{result.parts_kept} of {result.parts} parts were done before and kept"
    if said:
        console.print(f"{name}: {said}", soft_wrap=True)
    if not result.outputs:
        assert share
        done = f"--shard {share[0]}/{share[1]} is done"
        rest = "the last shard to finish puts the datasets together"
        console.print(f"{name}: {done}; {rest}", soft_wrap=True)
        return result
    picture = indexed.with_ending(name, ".lengths.png")
    remove_left_over(picture)
    if not (result.kept and picture.exists()):
        from megacode.report.document_lengths import plot_lengths  # matplotlib

        datasets = {_shown(prefix): open_dataset(prefix) for prefix in result.outputs.values()}
        plot_lengths({name: statistics(one).histogram for name, one in datasets.items()}, picture)
    whole = not (result.kept or result.parts_kept or share)
    print_table(console, _results_table(result, seconds if whole else None))
    console.print(f"document lengths: {_shown(picture)}")
    return result


def _results_table(result: Result, seconds: float | None) -> Table:
    """Documents, tokens and so on by dataset, then what was left out.

    `seconds` is None if not everything was tokenized in this run.
    """
    table = table_of("", "dataset", "documents", "tokens", "MB", "bytes/token", "longest")
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
    counts, notes = result.counts, []
    if seconds is not None:
        speed = f"{counts.total.bytes / 1e6 / seconds:,.1f} MB/s"
        rate = f"{counts.total.tokens / seconds:,.0f} tokens/s"
        notes.append(f"{seconds:.1f} s, {speed}, {rate}")
    if counts.checked:
        which = f"{counts.checked:,} documents at random"
        notes.append(f"checked: {which} have the reference library's ids")
    notes += result.notes
    if counts.exact:
        notes.append(f"tokenized by the reference library alone: {counts.exact}")
    for what, reasons in (("bad", counts.bad), ("passed over", counts.passed_over)):
        notes += [f"{what}: {count:,} × {reason}" for reason, count in reasons.most_common(8)]
    if counts.repaired:
        which = f"{counts.repaired:,} documents with lone surrogates"
        notes.append(f"repaired: {which}, now U+FFFD")
    if result.quarantine:
        notes.append(f"left out, with reasons: {_shown(result.quarantine)}")
    table.caption = "\n".join(notes)
    return table


def _shown(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)
